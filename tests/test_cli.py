from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from wina.catalogue import PARTS
from wina.cli import app, main
from wina.cli_options import config_of
from wina.config import SparsityConfig
from wina.decoding import command
from wina.errors import ConfigError, PlanError, WinaError
from wina.methods import METHODS
from wina.patch import is_patched, patch_of
from wina.plan import SparsityPlan
from wina.saving import PLAN_FOLDER
from wina.testing import tiny_model, tiny_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a byte tokenizer, saved as transformers saves one."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def invoke(*arguments: str) -> str:
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["demo-model"], ["calibrate"], ["export"], ["inspect"], ["generate"],
     ["bench", "kernels"], ["bench", "decode"], ["bench", "profile"],
     ["bench", "roofline"], ["bench", "plot"], ["eval"],
     ["eval", "ppl"], ["eval", "verify"]],
)  # fmt: skip
def test_help(command: list[str]) -> None:
    assert "Usage" in invoke(*command, "--help")


def test_methods() -> None:
    found = json.loads(invoke("methods", "--json"))
    assert [row["method"] for row in found["methods"]] == list(METHODS)
    assert set(found) == {"methods", *PARTS}
    shown = invoke("methods")
    assert all(name in shown for name in (*METHODS, *PARTS))


def test_a_method_may_have_settings_of_its_own() -> None:
    assert config_of("wina", sparsity=0.4, head=None) == SparsityConfig(method="wina", sparsity=0.4)
    assert config_of("wina/head=sparse", head="dense").head == "sparse"
    with pytest.raises(ConfigError, match="no setting"):
        config_of("wina/nothing=1")


def test_generate_does_what_is_asked_for(folder: str, tmp_path: Path) -> None:
    plan, out = str(tmp_path / "plan"), str(tmp_path / "out")
    invoke("calibrate", plan, "--model", folder, "--tokens", "512", "--method", "wina")
    invoke("export", out, "--model", folder, "--plan", plan)

    class Loaded(Exception):
        """Comes in the place of decoding, with the model."""

    def request_of(*options: str) -> command.Request:
        made: list[command.Request] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "run", made.append)
            invoke("generate", "Hello", *options)
        return made[0]

    def loaded(*options: str) -> nn.Module:
        def decode(model: nn.Module, *_: Any, **__: Any) -> None:
            raise Loaded(model)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "decode", decode)
            with pytest.raises(Loaded) as found:
                command.run(request_of(*options))
        model: nn.Module = found.value.args[0]
        return model

    assert patch_of(loaded("-m", out)).plan.config.method == "wina"
    assert not is_patched(loaded("-m", out, "--method", "dense"))
    rounded = patch_of(loaded("-m", folder, "--method", "dense", "--weight-dtype", "int8")).plan
    assert (rounded.config.weight_dtype, rounded.config.sparsity) == ("int8", 0.0)
    with pytest.raises(ConfigError, match="leave out sparsity"):
        command.run(request_of("-m", out, "--plan", plan, "--sparsity", "0.4"))
    for wrong in (("--top-p", "2"), ("--temperature", "-1"), ("--repetition-penalty", "-1")):
        options = ("-m", "/nowhere", "--temperature", "1", *wrong)
        with pytest.raises(ConfigError):  # before anything is loaded
            command.run(request_of(*options))


def test_a_file_where_a_folder_is_to_be(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for name in ("calibrate", "export"):
        with pytest.raises(PlanError, match="name a folder"):
            invoke(name, str(file), "--model", folder)


def test_export_calibrates_on_the_text_it_is_given(folder: str, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("All work and no play. " * 200, encoding="utf-8")
    method = "wina/calibration_tokens=512/window=64"
    invoke("export", str(out), "--model", folder, "--method", method, "--text", str(text))
    assert SparsityPlan.load(out / PLAN_FOLDER).calibration["text"] == "given by the user"
    assert f"--text {text}" in (out / "README.md").read_text(encoding="utf-8")


def test_calibrate_inspect_generate(folder: str, tmp_path: Path) -> None:
    plan = str(tmp_path / "plan")
    said = invoke("calibrate", plan, "--model", folder, "--tokens", "1024", "--sparsity", "0.4")
    assert "wina-fisher at 40%" in said
    rows = json.loads(invoke("inspect", "--model", folder, "--plan", plan, "--json"))["rows"]
    assert len({row["sparsity"] for row in rows}) > 1
    assert "q_proj" in invoke("inspect", "--model", folder)
    text = invoke("generate", "Hello", "-m", folder, "--plan", plan, "--max-new-tokens", "5")
    assert text.startswith("Hello")


def test_export_inspect_generate(folder: str, tmp_path: Path) -> None:
    plan, out = str(tmp_path / "plan"), str(tmp_path / "out")
    invoke("calibrate", plan, "--model", folder, "--tokens", "1024", "--sparsity", "0.4")
    assert "wina-fisher at 40%" in invoke("export", out, "--model", folder, "--plan", plan)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in ("40% sparse", "arXiv 2505.19427", "wina export out --model", "Nothing: `wina ex"):
        assert words in card
    rows = json.loads(invoke("inspect", "--model", out, "--json"))["rows"]
    assert len({row["sparsity"] for row in rows}) > 1
    assert invoke("generate", "Hello", "-m", out, "--max-new-tokens", "3").startswith("Hello")
    # Everything else starts from the dense model.
    assert "wina-fisher at 50%" in invoke("calibrate", plan, "--model", out, "--tokens", "1024")


def test_eval_ppl(folder: str, tmp_path: Path) -> None:
    saved = tmp_path / "new" / "ppl.json"
    out = invoke(
        "eval", "ppl", "--model", folder, "--sparsities", "0.5", "--tokens", "1024",
        "--calibration-tokens", "1024", "--output", str(saved),
    )  # fmt: skip
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert json.loads(saved.read_text())["rows"] == rows
    assert [row["method"] for row in rows] == ["dense", "teal", "wina", "wina-fisher"]
    assert rows[0]["nats_over_dense"] == 0
    assert all(0.4 < row["realised_bytes_sparsity"] < 0.6 for row in rows[1:])


def test_eval_ppl_goes_on_where_it_was(folder: str, tmp_path: Path) -> None:
    saved = tmp_path / "ppl.json"
    common = (
        "eval", "ppl", "--model", folder, "--sparsities", "0.5", "--calibration-tokens", "1024",
        "--output", str(saved),
    )  # fmt: skip
    invoke(*common, "--tokens", "512", "--methods", "wina")
    document = json.loads(saved.read_text())
    document["rows"][1]["perplexity"] = 12.5  # as nothing would be measured
    saved.write_text(json.dumps(document))
    other = "wina/weight_dtype=int4+int4"
    out = invoke(*common, "--tokens", "512", "--methods", f"wina,{other}")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["dense", "wina", other]
    assert rows[1]["perplexity"] == 12.5
    assert json.loads(saved.read_text())["rows"] == rows
    assert rows[1]["parts"]["criterion"] == "l2-norm"
    with pytest.raises(WinaError, match="another --output"):
        invoke(*common, "--tokens", "256", "--methods", "wina")
    # The name stood for something else when this row was measured.
    document = json.loads(saved.read_text())
    document["rows"][1]["parts"]["criterion"] = "magnitude"
    saved.write_text(json.dumps(document))
    anew = invoke(*common, "--tokens", "512", "--methods", "wina")
    rows = json.loads(anew.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["dense", other, "wina"]
    assert rows[2]["perplexity"] != 12.5


def test_eval_ppl_keeps_what_allocations_measured(folder: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"

    def rows(sparsities: str, *more: str) -> list[dict[str, Any]]:
        out = invoke(
            "eval", "ppl", "--model", folder, "--sparsities", sparsities, "--tokens", "512",
            "--methods", "teal-greedy", "--calibration-tokens", "512", *more,
        )  # fmt: skip
        found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["rows"]
        return found

    there = ("--measurements", str(kept))
    assert rows("0.4,0.5", *there) == rows("0.4,0.5")
    (path,) = kept.iterdir()
    written = path.stat().st_mtime_ns
    rows("0.5", *there)  # walked as far before
    assert [(p, p.stat().st_mtime_ns) for p in kept.iterdir()] == [(path, written)]
    rows("0.5", *there, "--dtype", "bfloat16")  # another model
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "ppl", "--methods", "wina", "--sparsities", "0.5", "--tokens", "512",
         "--calibration-tokens", "512"],
        ["recommend", "--bytes", "0.6", "--methods", "wina", "--widths", "loaded",
         "--tokens", "512"],
    ],
)  # fmt: skip
def test_calibration_text(command: list[str], folder: str, tmp_path: Path) -> None:
    digits = tmp_path / "digits.jsonl"
    digits.write_text("".join(json.dumps({"text": str(n) * 40}) + "\n" for n in range(300)))

    def found(*more: str) -> str:
        return invoke(*command, "--model", folder, *more).splitlines()[-1].split('"machine"')[0]

    assert found() != found("--calibration", str(digits))


def test_demo(folder: str, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    out = invoke("demo", "--model", folder, "--sparsities", "0.5", "--picture", str(picture))
    report = json.loads(out.splitlines()[-1])
    assert [(r["method"], r["sparsity"]) for r in report["rows"]] == [
        ("dense", 0.0), ("teal", 0.5), ("wina", 0.5),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["perplexity"] > 1
        assert row["tokens_per_s"] > 0
        assert row["continuation"].startswith("The history of science is")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_kernels() -> None:
    out = invoke("bench", "kernels", "--shapes", "64x96", "--quick")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(r["dtype"], r["sparsity"]) for r in rows] == [
        (d, s) for d in ("float32", "bfloat16") for s in (0.0, 0.5, 0.65)
    ]
    assert {r["kept"] for r in rows if r["sparsity"] == 0.5} == {48}


def test_bench_decode(folder: str) -> None:
    out = invoke("bench", "decode", "--model", folder, "--new-tokens", "6", "--rounds", "1")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["dense", "dense", "teal", "teal", "wina", "wina"]
    assert {row["engine"] for row in rows} == {"transformers generate", "wina decode"}
    assert rows[2]["byte_ideal"] > 1
    assert 0.2 < rows[2]["realised"] < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "ppl", "--methods", "winna"], "Did you mean 'wina'"),
        (["calibrate", "out", "--sparsity", "1.5"], "sparsity is a share"),
        (["bench", "decode"], "either --model or --shape"),
        (["bench", "kernels", "--shapes", "64"], "N x K"),
        (["demo", "--sparsities", "half"], "numbers separated by commas"),
        (["inspect", "--plan", "/nowhere"], "no plan folder"),
        (["calibrate", "out", "--text", "/nowhere"], "cannot read"),
        (["eval", "ppl", "--calibration", "/nowhere"], "cannot read"),
        (["recommend", "--bytes", "0.5", "--calibration", "/nowhere"], "cannot read"),
    ],
)
def test_errors_are_one_line(
    folder: str, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if arguments[0] != "bench":
        arguments = [*arguments, "--model", folder]
    monkeypatch.setattr("sys.argv", ["wina", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_missing_model_folder(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["wina", "inspect", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "cannot load" in capsys.readouterr().err


def test_what_cannot_be_fetched_or_written_is_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No network and no place to write: exit code 1 and a message, no traceback."""
    for words in (
        ["inspect", "--model", "nobody/no-such-model"],
        ["calibrate", "/proc/plan", "--model", folder, "--tokens", "256"],
    ):
        monkeypatch.setattr("sys.argv", ["wina", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert "wina: cannot" in said
        assert "Traceback" not in said


def test_json_instead_of_text(folder: str, tmp_path: Path) -> None:
    """Nothing else is on stdout, so the output can be piped."""
    plan = str(tmp_path / "plan")
    asked = ("--model", folder, "--tokens", "1024", "--sparsity", "0.4", "--json")
    written = json.loads(invoke("calibrate", plan, *asked))
    assert (written["folder"], written["method"], written["sparsity"]) == (plan, "wina-fisher", 0.4)
    assert 0.3 < written["realised"] < 0.5
    out = str(tmp_path / "out")
    exported = json.loads(invoke("export", out, "--model", folder, "--plan", plan, "--json"))
    assert exported == {**written, "folder": out}
    said = json.loads(invoke("generate", "Hello", "-m", out, "--max-new-tokens", "3", "--json"))
    assert said["text"].startswith("Hello")
    assert (len(said["tokens"]), said["finish"]) == (3, "length")


def test_exit_codes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def code_of(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["wina", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    assert code_of("--version") == 0
    assert code_of("inspect", "--model", "/nowhere") == 1
    assert code_of("--log", "loud", "demo-model") == 1
    assert code_of("inspect", "--no-such-option") == 2

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wina.cli.load_model", stopped)
    assert code_of("inspect", "--model", folder) == 130


def test_logs_go_where_they_are_asked_for(folder: str, tmp_path: Path) -> None:
    import logging

    invoke("--log", "debug", "inspect", "--model", folder)
    assert logging.getLogger("wina").level == logging.DEBUG
    invoke("inspect", "--model", folder)
    assert logging.getLogger("wina").level == logging.WARNING


def test_completion_knows_the_methods() -> None:
    result = runner.invoke(
        app, [], prog_name="wina",
        env={"_WINA_COMPLETE": "complete_bash", "COMP_WORDS": "wina calibrate --method wina-",
             "COMP_CWORD": "3"},
    )  # fmt: skip
    assert {"wina-fisher", "wina-plus", "wina-greedy", "wina-paper"} <= set(result.stdout.split())
