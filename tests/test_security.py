"""What somebody else's run may not do here: its configuration is data, and its files are its own (docs/security.md)."""

import shutil

import pytest
import yaml
from conftest import command
from omegaconf import OmegaConf

from launch import policies, report, settings
from launch.policies import find_policy, read_config, read_unchecked
from sampling.samples import sample_log
from utils import UserError

SECRET = "sk-secret"


@pytest.fixture
def theirs(plain_run, tmp_path, monkeypatch):
    """Gives a copy of a run whose configuration says this and that."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def change(**keys):
        path = shutil.copytree(plain_run("dpo"), tmp_path / "theirs", symlinks=True, dirs_exist_ok=True)
        config = OmegaConf.create(yaml.safe_load((plain_run("dpo") / "config.yaml").read_text()))
        for key, value in keys.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        (path / "config.yaml").write_text(yaml.safe_dump(OmegaConf.to_container(config)))
        return path

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_url", "http://203.0.113.1/v1"),
        ("backend", "openai"),
        ("served_model", "theirs"),
        ("samples_dir", "/tmp/elsewhere"),
    ],
)
def test_where_something_goes_is_said_on_the_command_line(theirs, key, value):
    path = theirs(**{key: value})
    with pytest.raises(UserError, match=rf"theirs: its {key}={value} is not followed; to go there, give \+\+{key}="):
        read_config(path, [])
    assert read_config(path, [f"++{key}={value}"])[key] == value


@pytest.mark.parametrize("reference", ["${oc.env:OPENAI_API_KEY}", "${oc.${x}:OPENAI_API_KEY}", "${seed}", r"\${seed}"])
def test_what_looks_like_a_reference_is_text(theirs, reference):
    path = theirs(human_prefix=reference.replace("${", "\\${"), wandb__project=reference.replace("${", "\\${"))
    text = (path / "config.yaml").read_text().replace("\\\\${", "${").replace("\\${", "${")
    (path / "config.yaml").write_text(text)
    config = settings.typed(read_config(path, []))
    assert config.human_prefix == config.wandb.project
    assert "${" in config.human_prefix and SECRET not in config.human_prefix
    saved = settings.saved_config(path)
    assert saved is not None and saved.human_prefix == config.human_prefix
    page = report.write_run_page(path).read_text()
    assert SECRET not in page


def test_a_list_of_defaults_is_not_followed(theirs):
    path = theirs()
    (path / "more.yaml").write_text("seed: 7")
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(f"defaults: [more]\n{text}")
    with pytest.raises(UserError, match="defaults is read by nothing"):
        settings.typed(read_config(path, []))


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just text", "human_prefix: ${"])
def test_what_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: not a configuration"):
        read_config(tmp_path, [])


CODE = """
from pathlib import Path
from dataloader import PairedPreferenceDataLoader
from trainers import DPOTrainer

Path({ran!r}).touch()


class Theirs(DPOTrainer):
    pass


class TheirLoader(PairedPreferenceDataLoader):
    pass
"""


@pytest.mark.parametrize(("key", "name"), [("trainer", "Theirs"), ("dataloader", "TheirLoader")])
def test_code_runs_only_if_the_command_line_names_it(theirs, tmp_path, key, name):
    code, ran = tmp_path / "theirs.py", tmp_path / "ran"
    code.write_text(CODE.format(ran=str(ran)))
    path = theirs(**{f"loss__{key}": f"{code}:{name}"})
    with pytest.raises(UserError, match=rf"its loss\.{key} is code in .*theirs\.py; to run it, give \+\+loss\.{key}="):
        read_config(path, [])
    config = settings.typed(read_unchecked(path, []))  # as of a run that another is compared with
    policies.require_language_model(config, find_policy(path, config, []))
    assert not ran.exists()
    policies.trainer_class(settings.typed(read_config(path, [f"++loss.{key}={code}:{name}"])))
    assert ran.exists()


def test_a_terms_code_too(theirs, tmp_path):
    code, ran = tmp_path / "theirs.py", tmp_path / "ran"
    content = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef pull(policy_logps): return policy_logps\n"
    code.write_text(content)
    own = f"{code}:pull"
    path = theirs(term={"own": {"function": own, "weight": 1.0}})
    with pytest.raises(UserError, match=r"its term\.own\.function is code in .*theirs\.py; to run it, give"):
        read_config(path, [])
    policies.trainer_class(settings.typed(read_unchecked(path, [])))
    assert not ran.exists()
    settings.check_config(read_config(path, [f"++term.own.function={own}"]), modes=["sample"])
    assert ran.exists()


def test_this_programs_own_files_are_no_foreign_code(theirs):
    path = theirs(loss__trainer="autoencoders/training.py:SAETrainer")
    assert read_config(path, []).loss.trainer == "autoencoders/training.py:SAETrainer"


@pytest.mark.parametrize("name", ["../..", "..", "a/b", "/tmp/a", "", "a\\b"])
def test_a_runs_name_is_one_part_of_a_path(theirs, name):
    path = theirs(exp_name=name)
    with pytest.raises(UserError, match="is no name of a file"):
        read_config(path, [])
    assert read_config(path, ["++exp_name=mine"]).exp_name == "mine"


def test_how_many_processes_and_which_cache_are_the_commands(theirs, plain_run):
    config = read_config(theirs(nproc=512, cache_dir="/tmp/elsewhere"), [])
    assert (config.nproc, config.cache_dir) == (None, "outputs")
    own = read_config(plain_run("dpo"), ["++mode=eval", "++nproc=2"])
    assert (own.nproc, own.cache_dir) == (2, str(plain_run("dpo").parent))  # where it lies still


@pytest.mark.parametrize("mode", ["eval", "features"])
def test_a_copy_of_a_configuration_does_not_say_which_run_is_written_to(theirs, tmp_path, mode):
    copy = shutil.copy(theirs() / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(UserError, match=rf"mode={mode} writes into the run, so name that: --config-path=.*/dpo"):
        read_config(copy, [f"++mode={mode}"])
    read_config(copy, [])


def test_a_latest_that_leads_to_nothing_is_not_another_runs(theirs, plain_run):
    path = theirs()
    shutil.rmtree(path / "step-24")
    for named in (path, path / "config.yaml"):
        config = settings.typed(read_config(named, []))
        assert (plain_run("dpo") / "LATEST").exists()
        with pytest.raises(UserError, match="theirs/LATEST leads to nothing"):
            find_policy(named, config, [])


def test_links_in_a_run_are_not_written_through(theirs, tmp_path):
    path = theirs()
    (tmp_path / "mine").write_text("mine")
    (path / "eval.json.partial.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot write to"), sample_log(path / "eval.json", {}):
        pass
    (path / "features").symlink_to(tmp_path)
    with pytest.raises(UserError, match="features is a link"):
        find_policy(path, settings.typed(read_config(path, [])), [])
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_key_does_not_go_where_a_run_says(theirs):
    """The command as a user types it: nothing is asked for, and nothing is sent."""
    path = theirs(backend="openai", base_url="http://127.0.0.1:9/v1")
    done = command("eval.py", f"--config-path={path}", check=False)
    assert done.returncode == 2 and "is not followed" in done.stdout
    assert SECRET not in done.stdout + done.stderr
