"""A vLLM, or something else on its port, that says strange things or stands still: errors in time, in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.vllm.stand_in import Make, Unigram
from thence.errors import UserError
from thence.rollout.native import Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import VllmSettings

Script = Callable[[str], VllmSettings]

READY = "ask(); tell({'ready': ready})\n"
DONE = "{'done': 0, 'stamp': [0, 'd'], 'token_ids': [1], 'logps': [-1.0], 'finish': 'length'}"


@pytest.mark.parametrize(
    "body",
    [
        r"sock.sendall(b'\x15\x03\x03\0\2\2\x46'); ask()",  # a TLS alert
        "sock.sendall(b'-ERR unknown command'); ask()",  # Redis
        "sock.sendall((200000).to_bytes(4, 'big') + b'[' * 200000); ask()",
        "ask(); tell({'ready': [ready]})",
        "ask(); tell({'ready': {**ready, 'dtype': None}})",
        "ask(); tell({'ready': {**ready, 'max_model_len': '64'}})",
        "ask(); tell({'ready': {**ready, 'stamp': 3}})",
        "del ready['model']; ask(); tell({'ready': ready})",
        *(
            f"{READY}ask(); tell({{**{DONE}, {change}}}); ask()"
            for change in (
                *("'done': 7", "'done': '0'", "'done': None", "'done': [0]", "'done': True", "'stamp': None"),
                *("'token_ids': None", "'token_ids': ['a']", "'token_ids': [-1]", "'token_ids': []", "'logps': None"),
                *("'token_ids': [1] * 9", "'logps': ['x']", "'token_ids': [2**40]", "'stamp': [0]"),
            )
        ),
        f"{READY}ask(); tell({DONE}); tell({DONE}); ask()",
    ],
)
def test_a_message_of_another_shape_is_an_error_and_no_traceback(script: Script, folder: Path, body: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"does not speak thence's protocol|is not of this version"):
        VllmEngine(script(body), folder).sample([[1]] * 2, [0, 1], Sampling(4))
    assert time.monotonic() - start < 8


FOR_EVER = "import time\nwhile True:\n    time.sleep(0.1)\n    "


@pytest.mark.parametrize(
    "body",
    [
        rf"{READY}ask();{FOR_EVER}sock.sendall(b'\0')",
        rf"{READY}ask();sock.sendall((60000000).to_bytes(4, 'big'));{FOR_EVER}sock.sendall(b' ')",
        f"{READY}ask();{FOR_EVER}tell({{'alive': 5}})",
        f"{READY}ask();{FOR_EVER}tell({{}})",
    ],
    ids=["bytes", "a long message", "alive", "nothing"],
)
def test_words_without_progress_do_not_hold_a_request_for_ever(script: Script, folder: Path, body: str) -> None:
    settings = script(body.replace(";import", "\nimport")).model_copy(update={"silence_seconds": 0.5})
    start = time.monotonic()
    with pytest.raises(UserError, match=r"for 0\.5 s|protocol"):
        VllmEngine(settings, folder).sample([[1]], [0], Sampling(4))
    assert time.monotonic() - start < 10


def test_an_engine_that_steps_without_making_tokens_is_ended(fake: Make, folder: Path) -> None:
    with (
        VllmEngine(fake("stuck", silence_seconds=4.0), folder) as engine,
        pytest.raises(UserError, match=r"made no token for 4\.0 s"),
    ):
        engine.sample([[1]], [0], Sampling(10**7))


@pytest.mark.parametrize("probe", ["None", "[]", "['x'] * 23", "[float('nan')] * 23", "[-1.0] * 5"])
def test_weights_are_not_believed_to_have_arrived_on_a_strange_reply(script: Script, folder: Path, probe: str) -> None:
    settings = script(f"""
        ask(); tell({{"ready": ready}})
        asked = ask()
        tell({{"loaded": True, "stamp": [asked["version"], asked["digest"]], "probe_logps": {probe}}})
        ask()
    """)
    with pytest.raises(UserError, match="does not speak thence's protocol"):
        VllmEngine(settings, folder).push_weights(Unigram(7), 1)


def test_a_request_larger_than_any_message_is_refused(
    fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(fake(), folder)
    monkeypatch.setattr("thence.framed.LARGEST", 1000)
    with pytest.raises(UserError, match=r"can be sent(.|\n)*fewer prompts"):
        engine.sample([[1, i] for i in range(200)], range(200), Sampling(4))


def test_what_vllm_prints_reaches_the_terminal_clean(script: Script, folder: Path) -> None:
    settings = script(r"""
        print("\x1b[2Jtoken hf_abcdefghijklmnopqrst \u202e", flush=True)
        ask(); tell({"failed": "\x1b]0;owned\x07 http://me:hunter2@host/"})
    """)
    with pytest.raises(UserError) as caught:
        VllmEngine(settings, folder)
    text = str(caught.value)
    assert "owned" in text and not any(bad in text for bad in ("\x1b", "\x07", "\u202e", "hunter2", "hf_abc"))
