"""The `ksi` command as people and programs use it: real processes on a real var directory."""

import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trouble import until

from ksi.actors.owners import OWNERS, load_all
from ksi.console.declared import catalogue, example, summary
from ksi.console.events import _write as write_event
from ksi.console.main import SUBCOMMANDS, main
from ksi.transport.message import encode

PATIENCE_S = 10.0  # A test that waits longer has failed.
KSI = (sys.executable, "-P", "-m", "ksi.console")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its standard output, which must be one JSON object."""
        content: dict[str, Any] = json.loads(self.out)
        return content


class Shell:
    """Types `ksi` commands on one var directory."""

    def __init__(self, var: Path) -> None:
        self.var = var

    def __call__(self, *words: str, stdin: str | None = None, **env: str) -> Done:
        done = subprocess.run(
            [*KSI, *words], env=self.environment(env), input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def environment(self, env: dict[str, str] | None = None) -> dict[str, str]:
        """Return the variables a command sees: none of ours but the directory."""
        usual = {name: value for name, value in os.environ.items() if not name.startswith("KSI_")}
        return {**usual, "KSI_VAR": str(self.var), **(env or {})}

    def owner(self, name: str) -> dict[str, Any]:
        """Return what `ksi status` tells of an owner."""
        owners = self("status", "--json").json["owners"]
        return next(each for each in owners if each["name"] == name)


@pytest.fixture
def nothing(tmp_path: Path) -> Shell:
    """A directory where nothing has ever run."""
    return Shell(tmp_path / "var")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A running system that the tests below share; what they make in it has names of their own."""
    ksi = Shell(tmp_path_factory.mktemp("console") / "var")
    started = ksi("start")
    assert started.code == 0, started.err
    yield ksi
    ksi("stop", "--now")


def the_error(done: Done, code: str) -> str:
    """Return the text of the one error, after checking that it has the form all errors have."""
    found = re.fullmatch(rf"ksi: {code}: (.+)\n  (\S.*)\n", done.err)
    assert found is not None, done.err
    assert done.out == ""
    return f"{found[1]}\n{found[2]}"


# Without a system


def test_version_is_printed_without_loading_what_it_does_not_need(nothing: Shell) -> None:
    assert re.fullmatch(r"ksi \d+\.\d+\.\d+ \(Python [\d.]+\)\n", nothing("version").out)
    code = (
        "import sys; from ksi.console.main import main; main(['version']);"
        "print(*{'rich', 'zmq', 'lmdb', 'msgspec', 'psutil', 'pykka'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == ""


def test_status_of_nothing_loads_no_rich_and_says_what_to_type(nothing: Shell) -> None:
    code = (
        "import sys; from ksi.console.main import main; code = main(['status']);"
        "assert 'rich' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=nothing.environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "KSI is not running" in done.stdout
    assert "(ksi start)" in done.stdout
    assert not nothing.var.exists()


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_explains_itself_and_knows_json(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: ksi {name}")
    assert "--json" in shown
    assert "--var DIR" in shown


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["stauts"], 2, "usage: there is no ksi stauts, did you mean status?\n  ksi --help"),
        (["status", "--jsn"], 2, "usage: No such option '--jsn'"),
        (["sessions", "shw"], 2, "usage: there is no ksi sessions shw, did you mean show?"),
        (["ask", "session:apend"], 2, "unknown_operation: there is no operation 'session:apend'\n"
                                      "  did you mean session:append?"),
        (["ask", "session:append", "--sesion-id", "s"], 2,
         "invalid: session:append has no field --sesion-id, did you mean --session-id?\n"
         "  ksi help session:append"),
        (["ask", "session:append", "--session-id", "s"], 2, "invalid: session:append: Object mi"),
        (["ask", "session:append", "--session-id", "../s", "--event", "e"], 2, "invalid: session"),
        (["ask", "session:append", "--data", "{text}"], 2, "invalid: --data takes JSON (object)"),
        (["ask", "session:append", "--data", '{"a": NaN}'], 2, "invalid: --data takes JSON"),
        (["ask", "session:create", "--fields", "[1]"], 2, "invalid: --fields takes a JSON object"),
        (["read", "session:append"], 2, "usage: session:append is a command: use ksi ask session"),
        (["send", "session:get"], 2, "usage: session:get is a query: use ksi read session:get"),
        (["help", "session:lst"], 2, "unknown_operation: there is no operation 'session:lst'\n"
                                     "  did you mean session:list?"),
        (["logs", "--since", "yesterday"], 2, "usage: Invalid value for '--since': 'yesterday'"),
        (["sessions", "close", "s"], 2, "usage: to close session s is final: say --yes"),
        (["start", "--set", "supervisor.intensty=1"], 2, "invalid: flag: there is no setting"),
        (["ask", "session:create"], 3, "not_running: no supervisor runs on"),
        (["send", "session:create"], 3, "not_running: no supervisor runs on"),
        (["read", "session:list"], 3, "not_running: "),
        (["sessions"], 3, "not_running: "),
        (["index", "rebuild"], 3, "not_running: no supervisor runs on"),
        (["index", "verify"], 3, "not_running: "),
        (["index", "query"], 3, "not_running: "),
        (["events", "--since", "soon"], 2, "usage: Invalid value for '--since'"),
        (["ps"], 3, "not_running: no supervisor runs on"),
        (["stop"], 3, "not_running: no supervisor runs on"),
        (["restart", "sessions"], 3, "not_running: no supervisor runs on"),
        (["logs"], 3, "not_running: "),
    ],
)  # fmt: skip
def test_errors_without_a_system(
    words: list[str],
    code: int,
    error: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KSI_VAR", str(tmp_path / "var"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(words) == code
    out, err = capsys.readouterr()
    assert err.startswith(f"ksi: {error}")
    assert re.search(r"\n  \S.*\n\Z", err), "no line says what to type next"
    assert out == ""


def test_with_json_an_error_is_an_object_on_standard_output(nothing: Shell) -> None:
    done = nothing("--json", "ask", "session:create")
    assert done.code == 3
    assert done.json["schema"] == "ksi.error/1"
    assert done.json["code"] == "not_running"
    assert done.json["hint"] == "ksi start"
    assert done.err.startswith("ksi: not_running:")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("bogus", "usage"),
        ("ask session:bogus", "unknown_operation"),
        ("ask session:append --sesion-id s", "invalid"),
        ("worker --provider bogus", "usage"),
    ],
)
def test_json_after_the_word_that_is_wrong_still_makes_the_error_an_object(
    words: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == code


@pytest.mark.parametrize("words", ["discover", "discover --json", "help session:append", "config"])
def test_who_reads_no_further_is_told_so_whenever_it_shows(nothing: Shell, words: str) -> None:
    unread, ours = os.pipe()
    os.close(unread)
    done = subprocess.run(
        [*KSI, *words.split()], env=nothing.environment(), stdout=ours, stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    os.close(ours)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_directory_is_named_as_it_is_named_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for usual, words in (("there", []), ("", ["--var", "there"])):
        monkeypatch.setenv("KSI_VAR", usual)
        assert main([*words, "stop"]) == 3
        assert f"no supervisor runs on {tmp_path}/there\n" in capsys.readouterr().err


def test_the_help_of_subscribe_names_all_whose_owners_announce(nothing: Shell) -> None:
    shown = nothing("subscribe", "--help").out
    assert all(f"`{word}`" in shown for owner in load_all().values() for word in owner.domains)


def test_common_options_go_before_and_after_the_subcommand(nothing: Shell, tmp_path: Path) -> None:
    for words in (
        ("--var", str(tmp_path / "a"), "--json", "status"),
        ("status", "--json", "--var", str(tmp_path / "a")),
    ):
        assert nothing(*words).json["var"] == str(tmp_path / "a")
    hint = nothing("--var", str(tmp_path / "a b"), "stop").err.splitlines()[1]
    assert hint == f"  ksi --var '{tmp_path / 'a b'}' start"


def test_ctrl_c_while_a_command_is_still_loaded_ends_it_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(
        "print('loading', flush=True)\nimport time\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [*KSI, "version"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert next_line(process) == "loading\n"
        process.send_signal(signal.SIGINT)
        _out, words = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, words) == (130, "")
    finally:
        process.kill()
        process.wait()


def test_discover_and_help_show_every_operation_from_its_declaration(nothing: Shell) -> None:
    listed = nothing("discover", "session:*", "--json").json["operations"]
    assert "session:append" in [each["operation"] for each in listed]
    assert all(each["operation"].startswith("session:") for each in listed)

    declared = nothing("help", "session:append", "--json").json
    assert declared["schema"] == "ksi.help/1"
    assert {"not_owner", "stale_epoch", "invalid", "busy"} <= set(declared["refuses"])
    fields = declared["fields"]["$defs"]["Append"]
    assert fields["required"] == ["session_id", "event"]

    assert declared["own"] is None
    assert declared["far_roles"] == declared["roles"]
    assert nothing("help", "message:waiting", "--json").json["own"] == "agent_id"
    assert "(over a network: operator)" in nothing("help", "agent:spawn").out

    assert "`start_time` for `since`" in nothing("help", "monitor:query").out
    assert "The same as event_log:query." in nothing("help", "monitor:query").out
    assert "--start-time" in nothing("read", "event_log:query", "--help").out

    shown = nothing("help", "session:append").out
    example = shown.splitlines()[-1]
    assert example.startswith("  ksi ask session:append --session-id ")
    assert "\x1b" not in shown


def test_the_page_of_operations_says_what_the_declarations_say(nothing: Shell) -> None:
    page = Path(__file__).parent.parent / "docs" / "operations.md"
    remedy = "bin/ksi discover --markdown > docs/operations.md"
    assert page.read_text() == nothing("discover", "--markdown").out, remedy


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_the_example_of_an_operation_is_one(name: str) -> None:
    operation = catalogue()[name]
    assert summary(operation).endswith((".", ";", ":"))
    operation.decode(encode(dict(operation.example)))
    assert shlex.split(example(operation))[2] == name


def test_config_says_where_a_value_comes_from(nothing: Shell) -> None:
    changed = nothing("config", "--json", KSI_SUPERVISOR__INTENSITY="7").json["settings"]
    assert changed["supervisor.intensity"]["value"] == 7
    assert "KSI_SUPERVISOR__INTENSITY" in changed["supervisor.intensity"]["origin"]
    assert changed["supervisor.period_s"]["origin"] == "default"

    refused = nothing("config", KSI_SUPERVISOR__INTENSTY="7")
    assert refused.code == 2
    assert "did you mean supervisor.intensity?" in the_error(refused, "invalid")
    assert "# intensity = 5" in nothing("config", "--defaults").out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ksi sta", {"start", "state", "status"}),
        ("ksi ask session:ap", {"append", "append_many"}),
        ("ksi ask session:append --se", {"--session-id"}),
        ("ksi ask session:create --admission ", {"open", "invited", "closed"}),
        ("ksi help session:tr", {"transfer"}),
    ],
)
def test_bash_completes_words_of_a_line(line: str, expected: set[str], nothing: Shell) -> None:
    program = nothing.var.parent / "ksi"
    program.write_text(f'#!/bin/sh\nexec {" ".join(KSI)} "$@"\n')
    program.chmod(0o700)
    script = (
        "source <(ksi completion bash);"
        f'COMP_LINE="{line}" COMP_POINT={len(line)}; _ksi_completion ksi;'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True,
        env=nothing.environment({"PATH": f"{program.parent}:{os.environ['PATH']}"}),
    )  # fmt: skip
    assert set(done.stdout.split()) == expected


def test_a_reader_that_goes_away_is_no_error(nothing: Shell) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(KSI)} discover | head -1"],
        env=nothing.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("OPERATION")
    assert done.stderr == ""


# With a system


def test_start_says_who_is_ready_and_a_second_one_names_the_holder(system: Shell) -> None:
    pid = system("status", "--json").json["supervisor"]["pid"]
    second = system("start")
    assert second.code == 5
    assert f"pid {pid}" in the_error(second, "conflict")


def test_status_of_a_healthy_system_has_every_field_promised(system: Shell) -> None:
    done = system("status", "--json")
    status = done.json
    assert done.code == 0, status["problems"]
    assert status["schema"] == "ksi.status/1"
    assert status["healthy"] is True
    assert status["phase"] == "ready"
    assert status["offline"] is False
    assert {"pid", "uptime_s"} <= set(status["supervisor"])
    assert {"sessions", "queue", "agents", "checkpoint"} <= set(status)
    assert status["problems"] == []
    assert [owner["name"] for owner in status["owners"]] == list(OWNERS)
    for owner in status["owners"]:
        assert owner["state"] == "RUNNING"
        assert {
            "name", "state", "pid", "uptime_s", "mailbox", "mailbox_peak", "oldest_ms",
            "commands_per_s", "p99_ms", "restarts", "epoch", "last_exit", "journal_seq", "db_bytes",
        } <= set(owner)  # fmt: skip
        os.kill(owner["pid"], 0)


def test_what_is_sent_is_printed_by_who_subscribes(system: Shell) -> None:
    command = [*KSI, "--as", "ear", "subscribe", "news.*", "--count", "2", "--json"]
    with subprocess.Popen(
        command, env=system.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as ear:  # fmt: skip
        assert ear.stdout is not None
        assert ear.stderr is not None
        assert ear.stderr.readline() == "listening to news.* as ear\n"
        for n in (1, 2):
            message = json.dumps({"n": n})
            sent = system("send", "message:publish", "--topic", "news.x", "--message", message)
            assert sent.json["delivered"] is True
        heard = [json.loads(line) for line in ear.stdout]
    assert ear.returncode == 0
    assert [each["message"] for each in heard] == [{"n": 1}, {"n": 2}]
    assert heard[0].keys() == {"topic", "sender", "seq", "gap", "redelivered", "message"}
    assert {(each["topic"], each["sender"]) for each in heard} == {("news.x", "operator")}


def test_a_durable_subscription_prints_what_came_while_nobody_read_and_only_once(
    system: Shell,
) -> None:
    subscribe = ("--as", "ear", "subscribe", "later.*", "--durable", "d", "--timeout", "100ms")
    assert system(*subscribe).out == ""
    system("send", "message:publish", "--topic", "later.x", "--message", '{"n": 1}')
    assert re.fullmatch(r"\d\d:\d\d:\d\d later\.x operator: \{\"n\": 1\}\n", system(*subscribe).out)
    assert system(*subscribe).out == ""


def test_what_is_asked_is_read_back_and_counted(system: Shell) -> None:
    created = system("ask", "session:create", "--session-id", "talk", "--title", "-x --y")
    assert created.json["epoch"] == 1
    appended = system(
        "ask", "session:append", "--session-id", "talk", "--event", "note",
        "--data", '{"text": "hällo", "n": 1}', "--json",
    )  # fmt: skip
    assert appended.json["schema"] == "ksi.ask/1"
    assert appended.json["seq"] == 1
    sent = system(
        "send", "session:append", "--session-id", "talk", "--fields", "-",
        stdin='{"event": "note", "data": {"text": "two"}}',
    )  # fmt: skip
    assert sent.json == {"operation": "session:append", "owner": "sessions", "delivered": True}

    page = system("read", "session:history", "--session-id", "talk").json
    assert [entry["data"] for entry in page["entries"]] == [
        {"text": "hällo", "n": 1},
        {"text": "two"},
    ]
    assert page["entries"][0]["metadata"]["agent_id"] == "operator"
    asked = system("ask", "session:history", "--session-id", "talk").json
    assert asked == page
    assert system("status", "--json").json["sessions"] >= 1


@pytest.mark.parametrize(
    ("words", "code", "error", "says"),
    [
        (["ask", "session:create", "--session-id", "mine"], 5, "conflict", "exists already"),
        (["--as", "eve", "ask", "session:append", "--session-id", "mine", "--event", "e"],
         5, "not_owner", "is written by operator (epoch 1), not by eve"),
        (["ask", "session:append", "--session-id", "mine", "--event", "e", "--epoch", "9"],
         5, "stale_epoch", "is in epoch 1, not 9"),
        (["--as", "sessions", "ask", "session:list"], 5, "forbidden", "sessions"),
        (["read", "session:get", "--session-id", "none"], 6, "not_found", "there is no session"),
        (["ask", "session:get", "--session-id", "none"], 6, "not_found", "there is no session"),
        (["sessions", "show", "none"], 6, "not_found", "there is no session none"),
        (["logs", "nobody"], 6, "not_found", "no process nobody has logged here"),
    ],
)  # fmt: skip
def test_refusals_have_their_exit_codes(
    words: list[str], code: int, error: str, says: str, system: Shell
) -> None:
    system("ask", "session:create", "--session-id", "mine")
    done = system(*words)
    assert done.code == code
    assert says in the_error(done, error)


def test_the_state_is_set_read_listed_asked_and_watched(system: Shell) -> None:
    made = system("state", "set", "config/model", '{"name": "opus", "n": 1e300}', "--json").json
    watched = subprocess.Popen(
        [*KSI, "state", "watch", "config/", "--after", str(made["revision"] - 1), "-n", "3",
         "--json"],
        env=system.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert json.loads(system("state", "get", "config/model").out) == {"name": "opus", "n": 1e300}
    stale = system("state", "set", "config/model", "1", "--revision", "0")
    assert stale.code == 5
    assert f"has the revision {made['revision']}" in the_error(stale, "conflict")
    assert system("state", "set", "config/text", "plain words").code == 0
    assert system("state", "set", "config/digits", "12", "--text").code == 0
    assert [json.loads(system("state", "get", f"config/{key}").out) for key in ("text", "digits")] \
        == ["plain words", "12"]  # fmt: skip
    listed = system("state", "list", "config/", "--limit", "2", "--json").json
    assert (list(listed["keys"]), listed["more"]) == (["config/digits", "config/model"], True)
    out, _ = watched.communicate(timeout=30)
    changes = [json.loads(line) for line in out.splitlines()]
    assert [each["id"] for each in changes] == ["config/model", "config/text", "config/digits"]
    assert system("state", "delete", "config/text", "--yes").code == 0
    assert system("state", "get", "config/text").code == 6

    system("ask", "state:entity:create", "--type", "task", "--id", "t1", "--properties", '{"n": 3}')
    system("ask", "state:relationship:create", "--from", "t1", "--to", "t1", "--type", "follows")
    only = ("--type", "task", "--where", '{"n": {"$gt": 2}}')
    assert [e["id"] for e in system("state", "query", *only, "--json").json["entities"]] == ["t1"]
    assert "t1 follows t1" in system("state", "show", "t1").out
    assert system("state", "query", "--where", "{").code == 2
    assert '{"n": 3}' in system("state", "query", *only).out
    pushed = ("--namespace", "jobs", "--key", "todo", "--data", "[1]")
    system("ask", "async_state:push", *pushed)
    assert "todo" in system("state", "queues").out
    assert re.search(r"relationship +follows +1", system("state").out)
    assert system("status", "--json").json["state"] == {"entities": 3, "queued": 1}


def test_the_index_is_asked_built_again_and_verified(system: Shell) -> None:
    system("ask", "session:create", "--session-id", "found", "--pattern", "peer_to_peer")
    for number in (1, 2):
        system("ask", "session:append", "--session-id", "found", "--event", "completion:request",
               "--data", '{"to_agent": "bob"}', "--correlation-id", f"r{number}")  # fmt: skip
    built = system("index", "rebuild", "--json").json
    assert built["done"]
    assert built["rows"] >= 2
    only = ("--session", "found")
    found = system("index", "query", *only, "--agent", "bob", "--since", "1h", "--json").json
    assert [each["correlation_id"] for each in found["entries"]] == ["r2", "r1"]
    assert found["more"] is False
    assert system("index", "query", *only, "--pattern", "swarm", "--json").json["entries"] == []
    pending = system("index", "query", *only, "--pending", "--limit", "1")
    assert "r1" in pending.out
    assert "r2" not in pending.out
    assert "there are more" in pending.err

    assert "following" in system("index").out
    assert system("index", "status", "--json").json["rebuilt"] == built["number"]
    report = system("index", "verify", "--json")
    assert (report.code, report.json["differences"]) == (0, 0)
    file = system.var / "logs" / "responses" / "sessions" / "found.jsonl"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"request", b"reqzest", 1))
    wrong = system("index", "verify")
    assert wrong.code == 1
    assert "line 1 of found.jsonl, at byte 0, is not what its row says: event_type" in wrong.out
    file.write_bytes(content)
    assert "ordered" in system("index", "rebuild", "--no-wait").out


def test_sessions_are_listed_shown_followed_handed_over_and_closed(system: Shell) -> None:
    system("ask", "session:create", "--session-id", "plan", "--title", "a \x1b[31mred plan")
    for number in range(3):
        system("ask", "session:append", "--session-id", "plan", "--event", "note",
               "--data", json.dumps({"n": number}))  # fmt: skip

    listed = system("sessions", "--json").json["sessions"]
    assert "plan" in [each["session_id"] for each in listed]
    assert "\\x1b[31mred plan" in system("sessions", "list").out
    assert "PARTICIPANT" in system("session", "show", "plan").out
    tail = system("sessions", "tail", "plan", "-n", "2", "--json").json
    assert [entry["data"]["n"] for entry in tail["entries"]] == [1, 2]

    handed = system("sessions", "transfer", "plan", "--to", "bob", "--json").json
    assert handed["owner"] == "bob"
    assert handed["epoch"] == 2
    assert system("sessions", "close", "plan", "--yes").code == 0
    closed = system("sessions", "list", "--status", "closed", "--json").json["sessions"]
    assert [each["session_id"] for each in closed] == ["plan"]


def test_tail_follows_a_session_as_it_grows(system: Shell) -> None:
    assert system("ask", "session:create", "--session-id", "live").code == 0
    tail = subprocess.Popen(
        [*KSI, "sessions", "tail", "live", "-f", "--json"],
        env=system.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for number in (1, 2):
            append = ("session:append", "--session-id", "live", "--event", "note")
            assert system("ask", *append).json["seq"] == number
            assert json.loads(next_line(tail))["seq"] == number
        tail.send_signal(signal.SIGINT)
        assert tail.wait(PATIENCE_S) == 130
    finally:
        tail.kill()
        tail.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    """Return the next line a process says, if it comes in time. It says one at a time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
    assert ready, "nothing was said in time"
    return process.stdout.readline()


def test_the_queue_is_listed_shown_cancelled_and_watched(system: Shell) -> None:
    assert system("ask", "session:create", "--session-id", "queued").code == 0
    async_ = ("ask", "completion:async", "--session-id", "queued", "--requires", "echo")
    watching = subprocess.Popen(
        [*KSI, "queue", "watch", "--json"],
        env=system.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stderr is not None
    assert "watching" in watching.stderr.readline()
    for request_id in ("q1", "q2"):
        assert system(*async_, "--prompt", "\x1b[31mhi", "--request-id", request_id).code == 0
    listed = system("queue", "--json").json
    assert (listed["waiting"], listed["active"], listed["workers"]) == (2, 0, [])
    assert [each["request_id"] for each in listed["requests"]] == ["q1", "q2"]
    assert system("status", "--json").json["queue"] == {"waiting": 2, "active": 0, "workers": 0}
    assert "needs echo" in system("queue", "list", "--session", "queued").out
    cancelled = system("queue", "cancel", "q2", "--reason", "not needed", "--json").json
    assert cancelled["status"] == "cancelled"
    assert system("queue", "cancel", "q2").code == 5
    assert system("queue", "show", "none").code == 6

    worker = subprocess.Popen(
        [*KSI, "--as", "w1", "worker", "--provider", "echo"],
        env=system.environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    said = [json.loads(watching.stdout.readline()) for _ in range(5)]
    worker.send_signal(signal.SIGTERM)
    _out, words = worker.communicate(timeout=20)
    assert (worker.returncode, words) == (0, "w1 answers with echo\n")
    assert [(each["request_id"], each["what"]) for each in said] == [
        ("q1", "queued"), ("q2", "queued"), ("q2", "cancelled"), ("q1", "granted"),
        ("q1", "result"),
    ]  # fmt: skip
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=20)
    assert watching.returncode == 130
    shown = system("queue", "show", "q1")
    assert "\\x1b[31mhi" in shown.out
    finished = system("queue", "list", "--status", "finished", "--json").json["requests"]
    assert [each["status"] for each in finished] == ["completed", "cancelled"]


def test_a_worker_needs_a_provider_it_knows_and_a_system(system: Shell, nothing: Shell) -> None:
    assert system("worker").code == 2
    unknown = system("worker", "--provider", "oracle")
    assert (unknown.code, "oracle" in unknown.err) == (2, True)
    assert nothing("worker", "--provider", "echo").code == 3


def test_ps_lists_every_process_of_the_system(system: Shell) -> None:
    processes = system("ps", "--json").json["processes"]
    names = [each["name"] for each in processes]
    assert {"supervisor", "registry", "sessions", "files"} <= set(names)
    assert all(each["rss_bytes"] > 0 for each in processes)
    assert system("ps").out.splitlines()[0].split()[:3] == ["PID", "NAME", "KIND"]


def test_logs_are_merged_and_narrowed(system: Shell) -> None:
    lines = system("logs", "--json").json["lines"]
    assert {"supervisor", "sessions"} <= {line["process"] for line in lines}
    assert lines == sorted(lines, key=lambda line: str(line["at"]))
    only = system("logs", "sessions", "--since", "1h", "-n", "1", "--json").json["lines"]
    assert [line["process"] for line in only] == ["sessions"]
    assert system("logs", "sessions", "--level", "error").out == ""


def test_a_table_is_drawn_only_on_a_terminal(system: Shell) -> None:
    plain = system("status").out
    assert "\x1b" not in plain
    assert re.search(r"^sessions +RUNNING +\d+ ", plain, flags=re.M)
    for env, coloured in (({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False)):
        assert ("\x1b[32m" in on_a_terminal(system, "status", **env)) is coloured


def on_a_terminal(ksi: Shell, *words: str, **env: str) -> str:
    """Return what a command shows on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*KSI, *words], env=ksi.environment(env), stdin=theirs, stdout=theirs, stderr=theirs
    ) as shown:
        os.close(theirs)
        content = b""
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            content += more
        shown.wait(10)
    os.close(ours)
    return content.decode()


def test_with_an_owner_stopped_reads_answer_and_status_says_so(system: Shell) -> None:
    system("ask", "session:create", "--session-id", "still")
    pid = system.owner("sessions")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert system("read", "session:get", "--session-id", "still").code == 0
        silent = system("ask", "session:get", "--session-id", "still", "--timeout", "300ms")
        assert silent.code == 4
        the_error(silent, "unavailable")
        degraded = system("status", "--json")
        assert degraded.code == 1
        assert degraded.json["healthy"] is False
        assert f"sessions is stopped by a signal (kill -CONT {pid})" in degraded.json["problems"]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert system("ask", "session:get", "--session-id", "still").code == 0


def test_a_killed_owner_is_back_for_the_next_command(system: Shell) -> None:
    before = system.owner("sessions")
    os.kill(before["pid"], signal.SIGKILL)
    assert system("ask", "session:create").code == 0
    after = system.owner("sessions")
    assert after["pid"] != before["pid"]
    assert after["restarts"] == before["restarts"] + 1
    assert after["epoch"] == before["epoch"] + 1
    assert "9" in after["last_exit"] or "KILL" in after["last_exit"]


def test_a_program_runs_as_an_agent_until_it_is_killed(system: Shell) -> None:
    program = "import os, time; print(os.environ['KSI_AGENT'], flush=True); time.sleep(60)"  # ended
    spawned = system("agents", "spawn", "worker", "--json", "--", sys.executable, "-c", program)
    assert spawned.code == 0, spawned.err
    pid = spawned.json["pid"]
    listed = system("agents", "--json").json["agents"]
    worker = next(each for each in listed if each["agent_id"] == "worker")
    assert (worker["status"], worker["pid"]) == ("active", pid)
    assert "worker" in [each["name"] for each in system("ps", "--json").json["processes"]]
    again = system("agents", "spawn", "worker", "--", "true")
    assert again.code == 5
    assert "worker is active already" in the_error(again, "conflict")

    ended = os.pidfd_open(pid)
    killed = system("agents", "kill", "worker", "--json").json
    assert killed["agent_ids"] == ["worker"]
    assert select.select([ended], [], [], 10)[0]
    os.close(ended)
    assert system("logs", "worker", "--output").out == "worker\n"
    assert system("agents", "kill", "nobody").code == 6


def test_a_program_that_cannot_run_is_a_failure_that_says_why(system: Shell) -> None:
    failed = system("agents", "spawn", "ghost", "--", "/nowhere/at/all")
    assert failed.code == 1
    assert "/nowhere/at/all" in the_error(failed, "failed")


def test_a_key_is_enrolled_revoked_and_renewed(system: Shell) -> None:
    enrolled = system("agents", "enroll", "mallory", "--json").json
    assert enrolled["role"] == "agent"
    assert Path(enrolled["key_file"]).stat().st_mode & 0o777 == 0o600
    assert system("--as", "mallory", "ask", "session:create").code == 0

    assert system("agents", "remove", "mallory").code == 2
    assert system("agents", "remove", "mallory", "--yes").code == 0
    refused = system("--as", "mallory", "ask", "session:create")
    assert refused.code == 5
    assert "revoked" in the_error(refused, "forbidden")

    renewed = system("agents", "enroll", "mallory", "--json").json
    assert renewed["public"] != enrolled["public"]
    assert system("--as", "mallory", "ask", "session:create").code == 0
    assert system("agents", "enroll", "sessions").code == 5
    outside = system.var / "mallory.key_secret"
    outside.touch()
    assert system("agents", "enroll", "../mallory").code == 2
    assert outside.exists()


def test_restart_renews_one_owner(system: Shell) -> None:
    before = system.owner("sessions")
    done = system("restart", "sessions", "--json")
    assert done.code == 0, done.err
    after = system.owner("sessions")
    assert after["pid"] == done.json["pid"] != before["pid"]
    assert after["restarts"] == before["restarts"]
    wrong = system("restart", "sesions")
    assert wrong.code == 6
    assert "did you mean sessions?" in the_error(wrong, "not_found")


# The life of a system of its own


def test_stopped_it_is_still_read_and_status_answers_from_disk(nothing: Shell) -> None:
    started = nothing("start", "--json")
    assert started.json["schema"] == "ksi.start/1"
    assert "sessions" in [each["child"] for each in started.json["children"]]
    nothing("ask", "session:create", "--session-id", "kept")
    assert nothing("restart", "--json").json["pid"] != started.json["pid"]
    stopped = nothing("stop", "--json")
    assert stopped.json["stopped"] is True

    status = nothing("status", "--json")
    assert status.code == 3
    assert status.json["offline"] is True
    assert status.json["healthy"] is False
    assert status.json["sessions"] == 1
    sessions = next(each for each in status.json["owners"] if each["name"] == "sessions")
    assert sessions["state"] == "STOPPED"
    assert sessions["journal_seq"] >= 1
    (files,) = status.json["followers"]
    assert files["journal_seq"] == sessions["journal_seq"]
    assert nothing("read", "session:get", "--session-id", "kept").code == 0
    assert nothing("ask", "session:get", "--session-id", "kept").code == 3


def test_after_the_supervisor_was_killed_status_says_so(nothing: Shell) -> None:
    nothing("start")
    os.kill(nothing("status", "--json").json["supervisor"]["pid"], signal.SIGKILL)
    after = nothing("status", "--json")
    assert after.code == 3
    assert any("killed" in problem for problem in after.json["problems"])
    assert nothing("start").code == 0
    assert nothing("status").code == 0
    nothing("stop")


def test_in_the_foreground_an_interrupt_stops_in_order(nothing: Shell) -> None:
    with subprocess.Popen(
        [*KSI, "start", "--foreground"],
        env=nothing.environment(), stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("ready"):
                break
        assert nothing("status").code == 0
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 0
    assert nothing("status").code == 3


def test_a_newer_layout_is_refused_untouched(nothing: Shell) -> None:
    nothing.var.mkdir()
    (nothing.var / "FORMAT").write_text("ksi 99\n")
    done = nothing("start")
    assert done.code != 0
    assert done.err.startswith("ksi: ")
    assert [path.name for path in nothing.var.iterdir()] == ["FORMAT"]


def test_what_has_happened_is_shown_found_and_exported(system: Shell, tmp_path: Path) -> None:
    who = ("--as", "watched")
    system(*who, "ask", "session:create", "--session-id", "happens")
    for _ in range(3):
        system(*who, "ask", "session:append", "--session-id", "happens", "--event", "note")
    only = ("--session", "happens")

    def logged() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = system("events", *only, "--json").json["events"]
        return found

    until(lambda: len(logged()) == 4)
    found = logged()
    assert [each["event"] for each in found] == ["session:created"] + ["session:appended"] * 3
    shown = system("events", *only, "--match", "session:app*", "--since", "10m", "--limit", "2")
    assert shown.out.count("session:appended  watched  happens") == 2
    assert "there are more" in shown.err
    rest = system("events", *only, "--after", str(found[1]["n"]), "--json").json
    assert [each["n"] for each in rest["events"]] == [each["n"] for each in found[2:]]
    assert "session:appended" not in system("events", "--until", "1h").out

    exported = system("events", "export", str(tmp_path / "out"), *only, "--resolve", "--json")
    assert exported.code == 0, exported.err
    assert exported.json["events"] == 4
    (day,) = (tmp_path / "out").iterdir()
    files = sorted(day.iterdir())
    assert len(files) == 4
    for path in files:
        event = json.loads(path.read_text())
        stem = f"evt_{event['timestamp']:.6f}_{event['event'].replace(':', '_')}"
        assert re.fullmatch(rf"{re.escape(stem)}(_\d+)?\.json", path.name)
    assert json.loads(files[-1].read_text())["data"]["line"]["event"] == "note"
    assert "not empty" in system("events", "export", str(tmp_path / "out")).err
    assert "dropped" in system("events", "stats").out


def test_events_are_followed_as_they_come(system: Shell) -> None:
    system("ask", "session:create", "--session-id", "followed")
    words = [*KSI, "events", "-f", "--session", "followed", "--match", "*:appended", "--json"]
    following = subprocess.Popen(words, env=system.environment(), stdout=subprocess.PIPE, text=True)
    try:
        for number in range(3):
            system("ask", "session:append", "--session-id", "followed", "--event", "note")
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["data"]["seq"] == number + 1
    finally:
        following.kill()
        following.communicate()


def test_a_thousand_events_of_one_moment_have_files_of_their_own(tmp_path: Path) -> None:
    event = {"timestamp": 1_777_896_000.123, "event": "agent:spawned"}
    used: dict[str, int] = {}
    for number in range(1000):
        write_event(event, tmp_path, {} if number == 7 else used)
    names = {path.name for path in (tmp_path / "2026-05-04").iterdir()}
    assert len(names) == 1000
    assert "evt_1777896000.123000_agent_spawned.json" in names
    if shutil.which("jq") is not None:
        command = ["jq", "-r", ".event", *map(str, sorted((tmp_path / "2026-05-04").iterdir()))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["agent:spawned"] * 1000
