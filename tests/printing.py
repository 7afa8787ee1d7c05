"""A program like `claude -p`: prints what its prompt asks for, in the forms the real one prints.

The forms are those of the Claude command line; their words are ours.
"""

import json
import os
import signal
import sys
import time

RESULT = {
    "type": "result", "subtype": "success", "is_error": False, "duration_ms": 2814,
    "duration_api_ms": 2755, "num_turns": 1, "result": "", "session_id": "",
    "total_cost_usd": 0.0763,
    "usage": {
        "input_tokens": 10, "cache_creation_input_tokens": 16524,
        "cache_read_input_tokens": 35238, "output_tokens": 182,
        "server_tool_use": {"web_search_requests": 0},
    },
    "modelUsage": {"claude-sonnet-4": {"inputTokens": 10, "outputTokens": 182}},
}  # fmt: skip


def result(text: str, **more: object) -> None:
    print(json.dumps({**RESULT, "result": text, **more}))


def main() -> None:
    words = sys.argv[1:]
    prompt = sys.stdin.read()
    resumed = words[words.index("--resume") + 1] if "--resume" in words else None
    model = words[words.index("--model") + 1] if "--model" in words else None
    if resumed == "lost":
        sys.exit(f"No conversation found with session ID: {resumed}")
    match prompt.split(":")[0]:
        case "text":
            print("Just words.\nAnd more.")
        case "stream":
            print(json.dumps({"type": "system", "subtype": "init", "session_id": "p1"}))
            content = [{"type": "text", "text": "Streamed."}]
            print(json.dumps({"type": "assistant", "message": {"content": content}}), flush=True)
            result("Streamed.", session_id="p1")
        case "verbose":
            print(json.dumps([{"type": "system"}, {**RESULT, "result": "One of many."}]))
        case "own":
            print(json.dumps({"response": "Mine.", "model": "m", "usage": {"input_tokens": 3}}))
        case "half":
            print(json.dumps({**RESULT, "result": "cut off"})[:70], end="")
        case "empty":
            pass
        case "limit":
            result("API Error: 429 rate_limit_error: slow down", is_error=True)
            sys.exit(1)
        case "key":
            result("Invalid API key · Please run /login", is_error=True, usage=None)
            sys.exit(1)
        case "turns":
            message = {**RESULT, "subtype": "error_max_turns", "is_error": True}
            del message["result"]
            print(json.dumps(message))
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            sys.exit("something is wrong here")
        case "much":
            while True:
                print("x" * 65536)
        case "hang" | "stubborn":
            if prompt.startswith("stubborn"):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open(prompt.split(":")[1].strip(), "w") as noted:
                noted.write(str(os.getpid()))
            time.sleep(60)  # until it is ended
        case "strange":
            print('{"neither": "this"}')
        case _:
            result(f"{resumed or 'new'} {model or 'any'} {prompt}", session_id="p2")


main()
