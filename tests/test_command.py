"""The command `python -m fdk_jax.generate`."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fdk_jax import command, doctor, evaluate_command, generate, models, usage
from fdk_jax.benchmark import adopt, report
from fdk_jax.models.hub import find_checkpoint
from fdk_jax.models.tokenizer import Tokenizer
from pallas_kernels import tuning

DATA = Path(__file__).parent / "data" / "models"
CHATTY = DATA / "llama3"


@pytest.fixture
def folder(writable):
    return writable(CHATTY)


# --- the command ------------------------------------------------------------------------------


def configure(folder: Path, **settings) -> None:
    """Changes config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    status = generate.main(["--model", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_command_streams_one_prompt(capsys):
    status, out, err = run(
        capsys, str(CHATTY), "--prompt", "the quick", "--max_tokens", "6", "--dtype", "float32"
    )
    assert status == 0
    assert out.startswith("the quick") and len(out) > len("the quick\n")
    assert "tokens/s" in err and "loaded" in err


@pytest.mark.parametrize("bits", [[], ["--bits", "4", "--head_bits", "8"]])
def test_command_with_a_batch_as_json(capsys, bits):
    arguments = ["--prompt", "the quick", "--prompt", "fox", "--max_tokens", "5", "--json"]
    status, out, _ = run(capsys, str(CHATTY), *arguments, "--quiet", *bits)
    answer = json.loads(out)
    assert status == 0
    assert len(answer["texts"]) == 2 and all(len(row) <= 5 for row in answer["tokens"])
    assert answer["tokens_per_second"] > 0


def test_command_chats(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n\n"))
    arguments = ["--chat", "--system", "be the fox", "--max_tokens", "4", "--temperature", "1"]
    status, _, err = run(capsys, str(CHATTY), *arguments, "--top_k", "9")
    assert status == 0
    assert err.count("tokens/s") == 2


def test_command_over_devices(capsys, folder):
    arguments = ["--prompt", "the fox", "--max_tokens", "5", "--dtype", "float32", "--quiet"]
    one = run(capsys, str(folder), *arguments)
    two = run(capsys, str(folder), *arguments, "--devices", "2")
    assert one[:2] == two[:2] and two[0] == 0


def test_command_with_guesses(capsys, folder):
    arguments = [
        "--prompt",
        "the fox the fox",
        "--max_tokens",
        "9",
        "--dtype",
        "float32",
        "--quiet",
    ]
    plain = run(capsys, str(folder), *arguments)
    assert run(capsys, str(folder), *arguments, "--speculate", "4") == plain
    assert plain[0] == 0


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), [], "tokenizer.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "rwkv"}'), [], "rwkv"),
        (lambda f: (f / "model.safetensors").unlink(), [], "safetensors"),
        (lambda f: None, ["--max_tokens", "5000"], "do not fit a context"),
        (lambda f: None, ["--head_bits", "8"], "--head_bits needs --bits"),
        (lambda f: None, ["--devices", "9"], "--devices 9"),
        (lambda f: None, ["--devices", "0"], "--devices 0"),
        (lambda f: None, ["--speculate", "17"], "--speculate 17"),
        (lambda f: None, ["--speculate", "2", "--prompt", "hen"], "one prompt on one device"),
        (lambda f: None, ["--system", "be brief"], "--system needs --chat"),
        (lambda f: None, ["--backend", "pallas"], "needs an NVIDIA GPU"),
        (lambda f: None, ["--prompt", ""], "every prompt needs"),
        (lambda f: shutil.rmtree(f), [], "does not exist"),
        (lambda f: None, ["--top_p", "7"], "top_p"),
        (lambda f: None, ["--max_tokens", "0"], "--max_tokens 0"),
        (lambda f: None, ["--max_context", "0"], "--max_context 0"),
        (lambda f: None, ["--prompt", "\ud800"], "is not UTF-8"),
        (lambda f: None, ["--prompt", "\udcff"], "is not UTF-8"),
        (lambda f: None, ["--chat_template", "x"], "--chat_template needs --chat"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), [], "tokenizer.json is no tokenizer"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), [], "tokenizer_config.json"),
        (lambda f: (f / "config.json").write_text("{"), [], "config.json is not valid JSON"),
        (lambda f: configure(f, dtype="float7"), [], "dtype='float7'"),
        (lambda f: configure(f, rope_parameters=dict(rope_type="linear")), [], "'factor'"),
        (lambda f: configure(f, rope_parameters=dict(rope_type="spiral")), [], "'spiral'"),
    ],
)
def test_command_errors_are_one_line(capsys, folder, change, arguments, words):
    change(folder)
    status, _, err = run(capsys, str(folder), "--prompt", "fox", "--quiet", *arguments)
    assert status == 2
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (generate.main, ["--nonsense"], "--model"),
        (evaluate_command.main, ["--model", "x"], "--text"),
        (doctor.main, ["--nonsense"], "--nonsense"),
        (tuning.main, ["--bits", "3"], "--bits 3: list some of (1, 2, 4, 8)"),
        (tuning.main, ["--shapes", "64"], "64 has shapes that are not NxK"),
        (tuning.main, ["--m", "0"], "0 is no list of numbers from 1 on"),
        (report.main, ["x"], "unrecognized arguments: x"),
        (adopt.main, ["x"], "results/TO.jsonl"),
        (usage.flags_parser("bench.py"), ["--nonsense"], "Unknown command line flag 'nonsense'"),
        (command.main, ["nonsense"], "no command 'nonsense'"),
    ],
)
def test_arguments_that_no_command_takes_are_one_line(capsys, main, arguments, words):
    takes_a_program = "flags_parser" in main.__qualname__
    try:
        status = main(["bench.py", *arguments] if takes_a_program else arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert words in err and ": error: " in err and err.count("\n") == 1


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_line(platform):
    """In a process of its own: JAX chooses its platforms once."""
    for arguments, environment in (["--platform", "cuda"], {}), ([], dict(JAX_PLATFORMS=platform)):
        command = [
            sys.executable,
            "-m",
            "fdk_jax.generate",
            "--model",
            str(CHATTY),
            "--prompt",
            "fox",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | environment
        done = subprocess.run(
            command + arguments,
            env=environment | dict(CUDA_VISIBLE_DEVICES=""),
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert "does not work here: " in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_ascii_locale():
    """What is typed and printed is UTF-8, whatever the locale says."""
    command = [sys.executable, "-m", "fdk_jax.generate", "--model", str(CHATTY), "--quiet"]
    done = subprocess.run(
        [*command, "--prompt", "fox 日本 🙂", "--max_tokens", "3"],
        env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8").startswith("fox 日本 🙂")


def test_command_prints_no_prompt_that_it_cannot_continue(capsys):
    status, out, err = run(capsys, str(CHATTY), "--prompt", "fox", "--max_tokens", "5000")
    assert status == 2 and out == "" and "loaded" not in err


def test_command_chats_in_text_only(capsys):
    status, _, err = run(capsys, str(CHATTY), "--chat", "--json")
    assert status == 2 and "--json needs --prompt" in err


def test_command_without_a_chat_template(capsys, folder):
    (folder / "tokenizer_config.json").unlink()
    status, _, err = run(capsys, str(folder), "--chat", "--quiet")
    assert status == 2 and "chat template" in err


# --- talks ------------------------------------------------------------------------------------


def say(monkeypatch, *lines: str) -> None:
    """What the user types."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def prompts(monkeypatch):
    """Every prompt that is read, as text; `prompts.answer` is said to each."""

    class Prompts(list):
        answer: Any = "fox"

    seen, tokenizer = Prompts(), Tokenizer(CHATTY)

    def speak(_tokenizer, _generator, prompt, options, _console):
        seen.append(tokenizer._tokenizer.decode(prompt, skip_special_tokens=False))
        seen.options = options
        if isinstance(seen.answer, str):
            yield tokenizer.encode(seen.answer)
            return
        for part in seen.answer:
            if isinstance(part, BaseException):
                raise part
            yield tokenizer.encode(part)

    monkeypatch.setattr(generate, "_speak", speak)
    return seen


def test_a_full_context_drops_the_oldest_turns_and_says_so(capsys, monkeypatch, prompts):
    say(monkeypatch, *(f"the quick {i}" for i in range(9)))
    arguments = ["--chat", "--system", "be", "--max_context", "100", "--max_tokens", "20"]
    status, _, err = run(capsys, str(CHATTY), *arguments)
    assert status == 0
    assert len(prompts) == 9
    assert all(prompt.startswith("<|system|>be<|end|><|user|>") for prompt in prompts)
    assert all(
        prompt.endswith(f"the quick {i}<|end|><|assistant|>") for i, prompt in enumerate(prompts)
    )
    assert "quick 0" in prompts[1] and "quick 0" not in prompts[8]
    assert all(len(Tokenizer(CHATTY).encode(p)) + 20 <= 100 for p in prompts)
    assert "the context of 100 tokens is full: the oldest 2 messages are forgotten" in err


def test_a_message_that_is_too_long_does_not_end_the_talk(capsys, monkeypatch, prompts):
    say(monkeypatch, "fox", "the quick brown " * 90, "quick")
    status, _, err = run(capsys, str(CHATTY), "--chat")
    assert status == 0
    assert err.count("error: this message makes a prompt of") == 1
    assert prompts[1] == (
        "<|user|>fox<|end|><|assistant|>fox<|end|><|user|>quick<|end|><|assistant|>"
    )


def test_ctrl_c_ends_an_answer_not_the_talk(capsys, monkeypatch, prompts):
    prompts.answer = ["the", KeyboardInterrupt()]
    say(monkeypatch, "one", "two")
    status, _, err = run(capsys, str(CHATTY), "--chat")
    assert status == 0 and err.count("the answer ends here") == 2
    assert prompts[1] == "<|user|>one<|end|><|assistant|>the<|end|><|user|>two<|end|><|assistant|>"


def test_ctrl_c_before_the_first_token_takes_the_question_back(capsys, monkeypatch, prompts):
    prompts.answer = [KeyboardInterrupt()]
    say(monkeypatch, "one", "two")
    assert run(capsys, str(CHATTY), "--chat")[0] == 0
    assert prompts[1] == "<|user|>two<|end|><|assistant|>"


def test_ctrl_c_twice_at_the_prompt_ends_the_talk(capsys, monkeypatch, prompts):
    lines = iter(["one", KeyboardInterrupt(), "two", KeyboardInterrupt(), KeyboardInterrupt()])

    def typed() -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    status, _, err = run(capsys, str(CHATTY), "--chat")
    assert status == 0 and len(prompts) == 2
    assert err.count("Ctrl-C again") == 2


def test_a_real_answer_that_is_interrupted(capsys, monkeypatch):
    """The generator is left as it was: the next answer is right."""
    stream = models.Generator.stream
    interrupt = iter([True, False])

    def interrupted(self, *args, **kwargs):
        broken = next(interrupt)
        for part in stream(self, *args, **kwargs):
            yield part
            if broken:
                raise KeyboardInterrupt

    monkeypatch.setattr(models.Generator, "stream", interrupted)
    say(monkeypatch, "one", "two")
    arguments = ["--chat", "--max_tokens", "5", "--dtype", "float32"]
    status, _, err = run(capsys, str(CHATTY), *arguments)
    assert status == 0 and err.count("tokens/s") == 1


def test_a_small_context_does_not_refuse_the_default(capsys, monkeypatch, folder, prompts):
    configure(folder, max_position_embeddings=64)
    status, out, _ = run(capsys, str(folder), "--prompt", "the quick", "--quiet")
    assert status == 0 and out.startswith("the quick")
    assert prompts.options["max_tokens"] == 64 - len(Tokenizer(CHATTY).encode("the quick"))
    say(monkeypatch, "fox")
    assert run(capsys, str(folder), "--chat")[0] == 0
    assert 16 <= prompts.options["max_tokens"] < 64


def test_variables_and_names_of_templates(capsys, monkeypatch, folder, prompts, tmp_path):
    template = "{% if thinking is not defined or thinking %}the {% endif %}{{ mood }}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("fox")
    (tmp_path / "mine.jinja").write_text("{{ 'quick' }}")
    for arguments, wanted in (
        (["--template_option", "mood=quick"], "the quick"),
        (["--template_option", "thinking=false", "--template_option", "mood=[1]"], "[1]"),
        (["--chat_template", "short"], "fox"),
        (["--chat_template", str(tmp_path / "mine.jinja")], "quick"),
    ):
        say(monkeypatch, "hi")
        assert run(capsys, str(folder), "--chat", *arguments)[0] == 0
        assert prompts[-1] == wanted


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        ("{{ 1 + 'a' }}", [], "TypeError"),
        ("{{ raise_exception('no talks') }}", [], "no talks"),
        ("{% if %}", [], "broken at line 1"),
        ("fox", ["--template_option", "mood"], "must be KEY=VALUE"),
        ("fox", ["--chat_template", "rag"], "none called 'rag'"),
        ("fox", ["--max_tokens", "9999"], "do not fit a context"),
    ],
)
def test_a_talk_that_cannot_begin_is_refused_before_loading(
    capsys, folder, template, arguments, words
):
    (folder / "chat_template.jinja").write_text(template)
    (folder / "model.safetensors").unlink()
    status, _, err = run(capsys, str(folder), "--chat", *arguments)
    assert status == 2
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_what_nobody_foresaw_is_one_line_too(capsys, monkeypatch):
    def fail(*_):
        raise KeyError("a\nb")

    monkeypatch.setattr(generate, "_complete", fail)
    status, _, err = run(capsys, str(CHATTY), "--prompt", "fox")
    assert status == 2
    assert err == "error: KeyError: 'a\\nb' (--debug shows where)\n"
    with pytest.raises(KeyError):
        run(capsys, str(CHATTY), "--prompt", "fox", "--debug")


# --- names of checkpoints ---------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A hub cache with one model, `someone/chatty`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "hub" / "models--someone--chatty"
    shutil.copytree(CHATTY, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_name_of_the_hub_is_found_on_this_disk(cached, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # beside which there is no b
    wanted = cached / "snapshots" / "abc123"
    assert find_checkpoint("someone/chatty") == wanted
    assert find_checkpoint(cached) == wanted
    assert find_checkpoint(str(CHATTY)) == CHATTY
    assert Tokenizer(find_checkpoint("someone/chatty")).can_chat
    with pytest.raises(FileNotFoundError, match="hf download someone/other"):
        find_checkpoint("someone/other")
    for name in ("nothing", "/none/such", "./a/b", "a/b/c", "../b"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            find_checkpoint(name)


def test_a_folder_of_the_hub_without_a_main_branch(cached):
    (cached / "refs" / "main").unlink()
    assert find_checkpoint(cached).name == "abc123"
    (cached / "snapshots" / "def456").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete download"):
        find_checkpoint(cached)


def test_command_takes_a_name_of_the_hub(capsys, cached):
    status, out, _ = run(capsys, "someone/chatty", "--prompt", "the quick", "--max_tokens", "3")
    assert status == 0 and out.startswith("the quick")
    status, _, err = run(capsys, "someone/nobody", "--prompt", "fox", "--quiet")
    assert status == 2 and err.count("\n") == 1 and "hf download" in err
