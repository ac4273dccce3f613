"""--quantize on the command line."""

import json

import pytest


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_both_tasks_and_a_converted_folder(cli, folder, picture, tmp_path, scheme):
    saved = tmp_path / scheme
    assert cli("convert", folder, saved, "--quantize", scheme).code == 0
    ask = ("describe", picture, "--max-new-tokens", 5)
    at_load, from_folder = cli(*ask, "--model", folder, "--quantize", scheme), cli(*ask, "--model", saved)
    assert at_load.code == from_folder.code == 0 and at_load.out == from_folder.out
    for source in (("--model", folder, "--quantize", scheme), ("--model", saved)):
        result = cli("generate", "a", "-o", tmp_path / "a.png", "--seed", 1, "--json", *source)
        assert result.code == 0 and json.loads(result.out)["seed"] == 1


def test_info(cli, folder):
    whole, quantised = (json.loads(cli("info", "--model", folder, "--json", *options).out) for options in ((), ("--quantize", "int4")))
    assert (whole["quantization"], quantised["quantization"]) == ("none", "int4")
    assert whole["parameters"] == quantised["parameters"]
    assert whole["bytes"]["weights"] > quantised["bytes"]["weights"]


def test_wrong_scheme(cli, folder, tmp_path):
    for command in (("info",), ("generate", "a", "-o", tmp_path / "a.png"), ("describe", tmp_path / "a.png")):
        result = cli(*command, "--model", folder, "--quantize", "int3")
        assert result.code == 2 and result.err.splitlines() == ["omnimamba: unknown quantization 'int3'; did you mean 'int8'?"]
    assert not (tmp_path / "a.png").exists()
