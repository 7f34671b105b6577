"""`code_interpreter` against the real sandbox, and against a Sandbox Fusion server that is typed from its format."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentloop.errors import ToolConfigError, ToolError
from agentloop.images import ImageFile
from agentloop.tool.loading import load_toolset
from agentloop.types import Task, ToolCall, ToolResult
from tests.tools.sandbox.support import Sandbox, Serving
from tests.virtual_time import run_virtually
from tools.code import CodeInterpreter, leases
from tools.http import ServiceClient

ESTABLISHED = """
tools:
  - class_name: recipe.retool.retool.CustomSandboxFusionTool
    config:
      sandbox_fusion_url: "http://127.0.0.1:9/run_code"
      num_workers: 128
      enable_global_rate_limit: true
      rate_limit: 128
      default_timeout: 30
      default_language: "python"
      memory_limit_mb: 1024
      type: native
    tool_schema:
      type: "function"
      function:
        name: "code_interpreter"
        description: "A tool for executing code."
        parameters:
          type: "object"
          properties:
            code:
              type: "string"
              description: "The code to execute."
          required: ["code"]
"""

FUSION_SUCCESS = {
    "status": "Success",
    "message": "",
    "compile_result": None,
    "run_result": {
        "status": "Finished",
        "execution_time": 0.016,
        "return_code": 0,
        "stdout": "Hello, world!\n",
        "stderr": "",
    },
    "executor_pod_name": None,
    "files": {},
}

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Iterator[Sandbox]:
    serving = Serving()
    yield serving.start(memory_mb=512, max_run_timeout_s=30.0)
    serving.end()


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Handler]]:
    """Replaces the network: the handlers answer, in turn; the last one stays."""
    handlers: list[Handler] = []
    original = ServiceClient.__init__

    def patched(self: ServiceClient, *args: Any, **options: Any) -> None:
        def handle(request: httpx.Request) -> httpx.Response:
            return (handlers.pop(0) if len(handlers) > 1 else handlers[0])(request)

        clock = lambda: asyncio.get_running_loop().time()  # noqa: E731  # a virtual one, in `run_virtually`
        original(self, *args, transport=httpx.MockTransport(handle), clock=clock, **options)

    monkeypatch.setattr(ServiceClient, "__init__", patched)
    yield handlers


def answered(body: dict[str, Any], status: int = 200, **headers: str) -> Handler:
    return lambda request: httpx.Response(status, json=body, headers=headers)


def make(url: str = "http://127.0.0.1:9", **config: Any) -> CodeInterpreter:
    assert CodeInterpreter.default_schema is not None
    return CodeInterpreter({"sandbox_url": url, **config}, CodeInterpreter.default_schema)


async def episode(tool: CodeInterpreter, *codes: str, **create_kwargs: Any) -> list[ToolResult]:
    state = await tool.open(Task("row", "tool_agent", []), **create_kwargs)
    try:
        return [await tool.execute(state, {"code": code}) for code in codes]
    finally:
        await tool.close(state)


def played(tool: CodeInterpreter, *codes: str, **create_kwargs: Any) -> list[ToolResult]:
    return asyncio.run(episode(tool, *codes, **create_kwargs))


def test_a_program_runs_in_the_sandbox(sandbox: Sandbox) -> None:
    codes = ["```python\nx = 6 * 7\nx\n```", "print(1)\n1 / 0", "def f(:", "import time; time.sleep(60)"]
    results = played(make(sandbox.url, timeout=1), *codes)
    assert (results[0].text, results[0].error) == ("42", None)
    assert results[1].text.startswith("1\nTraceback")
    assert results[1].error == "ZeroDivisionError: division by zero"
    assert results[2].error is not None and results[2].error.startswith("SyntaxError")
    assert results[3].error == "the program took longer than 1 s and was stopped"
    assert [result.metrics["failed"] for result in results] == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(
    ("code", "shown", "marks"),
    [
        ("1/0", "1/0\n", "\n    ~^~"),
        ("x = 3\ny = 0; x + x/y", "y = 0; x + x/y\n", "\n               ~^~"),
        ("f = lambda: 1/0\n[1,\n f()]", "     f()]\n", ""),
        ("1, 2/0", "1, 2/0\n", "\n       ~^~"),
        ("(lambda: 1/0)()", "(lambda: 1/0)()\n", "\n             ~^~"),
        ("class A:\n    def __repr__(self):\n        return 1/0\nA()", "in __repr__", ""),
    ],
)
def test_a_traceback_shows_what_the_model_wrote(
    sandbox: Sandbox, stateful: bool, code: str, shown: str, marks: str
) -> None:
    (result,) = played(make(sandbox.url, stateful=stateful), code)
    assert result.error == "ZeroDivisionError: division by zero"
    assert "lambda value" not in result.text and "print(value)" not in result.text, result.text
    assert shown.strip() in result.text and marks in result.text, result.text


def test_a_rows_files_are_there(sandbox: Sandbox) -> None:
    files = {"data.csv": base64.b64encode(b"1,2").decode()}
    assert played(make(sandbox.url), "open('data.csv').read()", files=files)[0].text == "1,2"


def test_variables_survive_in_an_episode_and_not_beyond(sandbox: Sandbox) -> None:
    tool = make(sandbox.url, stateful=True)
    first, second = played(tool, "x = 41", "x + 1")
    assert (first.text, second.text) == ("(no output)", "42")
    assert "NameError" in played(tool, "x")[0].text
    assert sandbox.health()["sessions"] == 0


def test_a_session_that_its_program_ended_is_replaced_and_the_model_told(sandbox: Sandbox) -> None:
    """One that ended for another reason fails the episode; with `on_failure: tell`, the model reads of it."""
    tool = make(sandbox.url, stateful=True, on_failure="tell")
    strict = make(sandbox.url, stateful=True)

    async def lose() -> list[ToolResult]:
        state = await strict.open(Task("row", "tool_agent", []))
        await strict.execute(state, {"code": "x = 1"})
        sandbox.post("/close_session", {"session_id": state.session})  # as its lease does
        with pytest.raises(ToolError, match=r"/run_code has lost the variables of an episode: .*session") as lost:
            await strict.execute(state, {"code": "print('on')"})
        assert lost.value.final
        await strict.close(state)

        state = await tool.open(Task("row", "tool_agent", []))
        first = await tool.execute(state, {"code": "x = 1"})
        sandbox.post("/close_session", {"session_id": state.session})
        second = await tool.execute(state, {"code": "print('on')"})
        ended = await tool.execute(state, {"code": "import os; os._exit(1)"})
        after = await tool.execute(state, {"code": "print('again')"})
        await tool.close(state)
        return [first, second, ended, after]

    _, second, ended, after = asyncio.run(lose())
    assert second.text == "[the interpreter was restarted: variables of earlier calls are gone]\non"
    assert "restarted" in ended.text
    assert after.text == "again"
    assert sandbox.health()["sessions"] == 0


def test_leases_of_open_sessions_are_renewed_and_of_no_others(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An episode that generates for minutes keeps its variables."""
    monkeypatch.setattr(leases, "RENEW_S", 0.2)
    tool = make(sandbox.url, stateful=True)
    renewed: list[str] = []
    sessions = sandbox.app.state.sessions
    original = sessions.renew
    monkeypatch.setattr(sessions, "renew", lambda names: renewed.extend(names) or original(names))

    async def idle() -> str:
        state, other = [await tool.open(Task("row", "tool_agent", [])) for _ in range(2)]
        await tool.execute(state, {"code": "x = 41"})
        await tool.execute(other, {"code": "import os; os._exit(0)"})
        name = str(state.session)
        renewed.clear()  # the other may have been renewed while it lived
        for _ in range(500):
            if len(renewed) >= 3:
                break
            await asyncio.sleep(0.05)
        assert (await tool.execute(state, {"code": "x + 1"})).text == "42"
        await tool.close(state)
        renewed_until = len(renewed)
        await asyncio.sleep(0.5)
        assert len(renewed) == renewed_until
        return name

    name = asyncio.run(idle())
    assert len(renewed) >= 3 and set(renewed) == {name}
    assert sessions._sessions == {}


def test_a_cell_that_is_sent_twice_runs_once(sandbox: Sandbox) -> None:
    session = sandbox.post("/sessions", {}).json()["session_id"]
    sandbox.run("n = 0", session_id=session)
    for _ in range(2):
        assert sandbox.printed("n += 1\nprint(n)", session_id=session, request_id="a") == "1\n"
    assert sandbox.printed("n += 1\nprint(n)", session_id=session, request_id="b") == "2\n"
    sandbox.post("/close_session", {"session_id": session})


def test_figures_come_back_as_images(sandbox: Sandbox) -> None:
    pytest.importorskip("PIL")
    drawn = """
import sys, types
plt = types.ModuleType('matplotlib.pyplot')
class Figure:
    def savefig(self, name, **_):
        from PIL import Image
        Image.new('RGB', (20, 10), 'red').save(name)
plt.get_fignums = lambda: [1, 2]; plt.figure = lambda n: Figure(); plt.close = lambda what: print('closed', what)
sys.modules['matplotlib.pyplot'] = plt
"""
    (result,) = played(make(sandbox.url, images=True), drawn)
    assert result.text == "closed all"
    assert [type(image) for image in result.images] == [ImageFile] * 2
    assert (result.images[0].width, result.images[0].height) == (20, 10)
    assert played(make(sandbox.url), drawn)[0].images == []
    junk = "open('agentloop-figure-0.png', 'w').write('not an image')  # matplotlib"
    assert played(make(sandbox.url, images=True), junk)[0].images == []


def test_long_output_is_cut_in_its_middle(sandbox: Sandbox) -> None:
    (result,) = played(make(sandbox.url, max_output_tokens=40), "for n in range(1000): print('line', n)")
    assert result.text.startswith("line 0\n") and result.text.endswith("line 999")
    assert "[cut: about" in result.text


def test_established_yaml_and_answers_of_sandbox_fusion(tmp_path: Path, fusion: list[Handler]) -> None:
    (tmp_path / "tools.yaml").write_text(ESTABLISHED)
    seen: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://127.0.0.1:9/run_code"
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=FUSION_SUCCESS)

    fusion.append(handle)
    toolset = load_toolset(tmp_path / "tools.yaml")

    async def call() -> ToolResult:
        session = toolset.session(Task("row", "tool_agent", []))
        try:
            return await session.call(ToolCall("code_interpreter", {"code": "print('Hello, world!')"}), 5.0)
        finally:
            await session.close()

    assert asyncio.run(call()).text == "Hello, world!"
    assert seen == [
        {
            "code": "print('Hello, world!')", "language": "python", "run_timeout": 30.0, "compile_timeout": 30.0,
            "memory_limit_MB": 1024, "files": {}, "fetch_files": [],
        }
    ]  # fmt: skip


BROKEN = {"status": "SandboxError", "message": "no space left", "run_result": None, "files": {}}


@pytest.mark.parametrize(
    "failure",
    [answered(BROKEN), answered({"error": "busy"}, 503, **{"retry-after": "1"}), answered({"error": "x"}, 500)],
    ids=["SandboxError", "503", "500"],
)
def test_failures_of_the_sandbox_are_tried_again(fusion: list[Handler], failure: Handler) -> None:
    fusion += [failure, failure, answered(FUSION_SUCCESS)]
    (result,) = run_virtually(episode(make(), "print(1)"))
    assert result.text == "Hello, world!"


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (answered(BROKEN), "no space left"),
        (answered({"error": "broken"}, 500), "500: broken"),
        (answered({"error": "who"}, 401), "401: who"),
        (lambda request: httpx.Response(200, json=[1]), "not an object"),
    ],
    ids=["SandboxError", "500", "401", "form"],
)
def test_a_sandbox_that_stays_broken_is_not_the_models_fault(
    fusion: list[Handler], failure: Handler, says: str
) -> None:
    fusion.append(failure)
    with pytest.raises(ToolError) as found:
        run_virtually(episode(make(retries=2), "print(1)"))
    assert found.value.final
    assert "code_interpreter at http://127.0.0.1:9/run_code" in found.value.message
    assert says in found.value.message

    (result,) = run_virtually(episode(make(retries=2, on_failure="tell"), "print(1)"))
    assert result.text == "Error: the sandbox failed; the program is not the cause."


def test_failures_that_only_the_model_reads_are_logged_once_and_counted_at_the_end(
    fusion: list[Handler], caplog: pytest.LogCaptureFixture
) -> None:
    fusion += [answered(FUSION_SUCCESS), answered({"error": "no disk"}, 500)]
    tool = make(retries=0, on_failure="tell")
    run_virtually(episode(tool, "1", "2", "3"))
    tool.shut_down()
    first, last = (record.getMessage() for record in caplog.records if record.name == "tools.http.failures")
    assert first.startswith("a call of code_interpreter failed") and "no disk" in first
    assert last.startswith("2 of 3 calls of code_interpreter failed")


def test_a_sandbox_that_is_away_is_waited_for_and_then_named(fusion: list[Handler]) -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    fusion += [away] * 20 + [answered(FUSION_SUCCESS)]
    (result,) = run_virtually(episode(make(), "print(1)"))
    assert result.error is None
    fusion[:] = [away]
    with pytest.raises(ToolError, match="unavailable"):
        run_virtually(episode(make(outage_s=20.0), "print(1)"))


def test_a_language_that_is_missing_is_the_fault_of_who_named_it(fusion: list[Handler]) -> None:
    fusion.append(answered({"error": "the language 'cobol' is not installed on this server"}, 400))
    tool = make()

    async def call() -> ToolResult:
        state = await tool.open(Task("row", "tool_agent", []))
        return await tool.execute(state, {"code": "DISPLAY 1.", "language": "cobol"})

    result = run_virtually(call())
    assert result.error is not None and "'cobol' is not installed" in result.error
    with pytest.raises(ToolError, match="'cobol' is not installed") as found:
        run_virtually(episode(make(default_language="cobol"), "DISPLAY 1."))
    assert "correct the config" in str(found.value)


@pytest.mark.parametrize(
    ("config", "says", "key", "advice"),
    [
        ({"timeout": 500}, "run_timeout 500 is more than this server grants (30)", "timeout", "--max-run-timeout-s"),
        ({"default_timeout": 500}, "run_timeout 500", "default_timeout", "--max-run-timeout-s"),
        ({"memory_limit_mb": 9999}, "memory_limit_MB 9999 is more", "memory_limit_mb", "--memory-mb"),
        ({"memory_limit_mb": 9999, "stateful": True}, "memory_limit_MB 9999 is more", "memory_limit_mb", "--memory-mb"),
        ({"default_language": "cobol"}, "'cobol' is not installed", "default_language", "it runs: python, bash"),
    ],
)
@pytest.mark.parametrize("tells", ["fail", "tell"])
def test_what_the_sandbox_refuses_is_named_by_the_key_of_the_config(
    sandbox: Sandbox, config: dict[str, Any], says: str, key: str, advice: str, tells: str
) -> None:
    tool = make(sandbox.url, on_failure=tells, **config)
    with pytest.raises(ToolError) as found:
        played(tool, "print(1)")
    assert found.value.final and says in found.value.message
    assert str(found.value.hint).startswith(f"correct the config of code_interpreter: `{key}`; the sandbox says: ")
    assert advice in str(found.value.hint)


def test_a_limit_of_the_config_is_not_the_models_fault_if_it_names_a_language(sandbox: Sandbox) -> None:
    tool = make(sandbox.url, timeout=500)

    async def call() -> ToolResult:
        state = await tool.open(Task("row", "tool_agent", []))
        return await tool.execute(state, {"code": "echo hi", "language": "bash"})

    with pytest.raises(ToolError) as found:
        asyncio.run(call())
    assert ": `timeout`;" in str(found.value.hint)


def test_a_row_with_wrong_files_is_named(sandbox: Sandbox) -> None:
    with pytest.raises(ToolError) as found:
        played(make(sandbox.url), "print(1)", files={"../up": ""})
    assert str(found.value.hint).startswith("correct `files` in the row's create_kwargs")


@pytest.mark.parametrize("language", ["python3", "py"])
def test_further_names_of_python_are_python(sandbox: Sandbox, language: str) -> None:
    first, second = played(make(sandbox.url, stateful=True, default_language=language), "x = 41", "x + 1")
    assert (first.text, second.text) == ("(no output)", "42")


@pytest.mark.parametrize(
    ("language", "says"),
    [("python", "a Python program"), ("bash", "a bash program"), ("cpp", "a C++ program"), ("js", "a JavaScript")],
)
def test_the_schema_names_the_language(language: str, says: str) -> None:
    assert says in make(default_language=language).schema["function"]["description"]
    assert "a Python program" in CodeInterpreter.default_schema["function"]["description"]
    schema = {"type": "function", "function": {"name": "run", "description": "Run Python.", "parameters": {
        "type": "object", "properties": {"code": {"type": "string"}}}}}  # fmt: skip
    own = CodeInterpreter({"sandbox_url": "http://127.0.0.1:9", "default_language": language}, schema)
    assert own.schema["function"]["description"] == "Run Python."


@pytest.mark.parametrize("code", ["", "   \n", "x" * 200_000, 5])
def test_calls_without_a_program_are_refused(fusion: list[Handler], code: Any) -> None:
    fusion.append(answered({}, 500))
    (result,) = run_virtually(episode(make(), code))
    assert result.error is not None


def test_other_languages_are_sent_as_they_are(fusion: list[Handler]) -> None:
    seen: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=FUSION_SUCCESS)

    fusion.append(handle)
    tool = make(images=True)

    async def call() -> None:
        state = await tool.open(Task("row", "tool_agent", []))
        await tool.execute(state, {"code": "```bash\nls matplotlib\n```", "language": "bash"})
        await tool.execute(state, {"code": "x = '\ud800'"})

    run_virtually(call())
    assert (seen[0]["code"], seen[0]["language"], seen[0]["fetch_files"]) == ("ls matplotlib\n", "bash", [])
    assert seen[1]["code"] == "x = '?'"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sandbox_url": None}, "no sandbox_url"),
        ({"sandbox_url": "ftp://x"}, "not the address"),
        ({"statefull": True}, "statefull"),
        ({"timeout": 0}, "config.timeout is 0"),
        (
            {"stateful": True, "default_language": "bash"},
            "default_language is 'bash': sessions are Python",
        ),
        ({"token_env": "AGENTLOOP_NO_SUCH_VARIABLE"}, "AGENTLOOP_NO_SUCH_VARIABLE"),
    ],
)
def test_wrong_configs_are_named(config: dict[str, Any], says: str) -> None:
    assert CodeInterpreter.default_schema is not None
    with pytest.raises(ToolConfigError, match=says):
        CodeInterpreter({"sandbox_url": "http://127.0.0.1:9", **config}, CodeInterpreter.default_schema)


def test_a_schema_needs_the_argument_code() -> None:
    schema = {"type": "function", "function": {"name": "run", "parameters": {"properties": {"program": {}}}}}
    with pytest.raises(ToolConfigError, match="'code'"):
        CodeInterpreter({"sandbox_url": "http://127.0.0.1:9"}, schema)


def test_the_docs_list_every_key_of_the_config(repo: Path) -> None:
    table = (repo / "docs/sandbox.md").read_text().split("| key of `config` |")[1].split("\n\n")[0]
    with pytest.raises(ToolConfigError) as found:
        make(no_such_key=1)
    known = str(found.value.hint).removeprefix("known keys: ").split(", ")
    assert len(known) > 15
    assert [key for key in known if key != "type" and f"`{key}`" not in table] == []
