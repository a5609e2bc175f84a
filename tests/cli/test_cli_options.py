"""Options from a file."""

import pytest
import yaml
from small import save

from lightning_koopman.cli.main import main
from lightning_koopman.report.files import read_reports

OPTIONS = {"model": "mine:network", "data": "mine:batches", "ckpt": ["1.ckpt"]}


@pytest.fixture
def project(user_module):
    return save(user_module("mine") / "1.ckpt").parent


def test_options_come_from_a_file_and_the_command_line_wins(project):
    (project / "o.yaml").write_text(
        yaml.safe_dump(OPTIONS | {"out": "r.json", "options": {"seed": 3, "max_dim": 64}})
    )
    assert main(["evaluate", "--config", "o.yaml", "--options.max-dim", "32"]) == 0
    (report,) = read_reports("r.json")
    options = report.source["options"]
    assert (options["seed"], options["max_dim"]) == (3, 32)


def test_the_printed_config_can_be_used(project, capsys):
    given = ["--model=mine:network", "--data=mine:batches", "--ckpt=1.ckpt", "--out=r.json"]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *given, "--print_config"])
    assert caught.value.code == 0
    (project / "o.yaml").write_text(capsys.readouterr().out)
    assert main(["evaluate", "--config", "o.yaml"]) == 0
    assert len(read_reports("r.json")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml.safe_dump(OPTIONS | {"sed": 3}), "'sed'"),
        (yaml.safe_dump(OPTIONS | {"folds": "many"}), "folds"),
        (None, "does not exist"),
    ],
)
def test_a_bad_config_exits_with_2_and_says_why(project, capsys, text, message):
    if text is not None:
        (project / "o.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--config", "o.yaml"])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
