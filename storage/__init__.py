"""What is on disk: journals, LMDB views, tables, snapshots and the files people read."""
