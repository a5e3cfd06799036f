import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
import yaml
from packaging.version import Version

import trl_ext
from tests.helpers.tiny import save_tiny_model, tiny_pairs
from trl_ext import cli
from trl_ext.scripts import equilibrium_classifier, equilibrium_reward, sparse_po
from trl_ext.scripts.recipe.loading import ignore_boolean_buffers, last_checkpoint, saved_text
from trl_ext.scripts.recipe.strict_parser import RecipeError, StrictParser


ROOT = Path(trl_ext.__file__).parents[1]


def write_recipe(folder, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def check(*arguments):
    sparse_po.make_parser().check(list(arguments))


def test_misspelt_keys_name_themselves_and_the_closest(tmp_path):
    recipe = write_recipe(tmp_path, betaa=0.5, mask_typ="ones", model_name_or_path="x")
    with pytest.raises(RecipeError) as error:
        check("--config", recipe, "--divergence_coeff", "1")
    for text in ("`betaa`", "`beta`", "`mask_typ`", "`mask_type`", "`divergence_coeff` in the command line", recipe):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"learning_rate": "fast"}, [], "learning_rate: 'fast'.*float"),
        ({"max_steps": True}, [], "max_steps: True.*int"),
        ({"mask_init": "dense"}, [], "mask_init: 'dense'.*one of"),
        ({"env": "A=1"}, [], "`env`"),
        ({"beta": [0.1, 0.2]}, [], r"beta: \[0.1, 0.2\].*float"),
        ({"max_steps": 2.5}, [], "max_steps: 2.5.*int"),
        ({"mask_learning_rate": True}, [], "mask_learning_rate: True.*float"),
        ({"use_cpu": 3}, [], "use_cpu: 3.*bool"),
        ({"per_device_train_batch_size": None}, [], "per_device_train_batch_size: None.*int"),
        ({"save_strategy": False}, [], "save_strategy: False.*quote it"),
        ({"datasets": ["json"]}, [], r"datasets\[0\].*must be a mapping"),
        ({"datasets": [{"data_files": "x"}]}, [], r"datasets.*lacks \['path'\]"),
        ({}, ["--max_steps", "many"], "max_steps.*many"),
        ({}, ["recipe.yaml"], "recipe.yaml"),
        ({}, ["--mask_init", "dense"], "mask_init.*dense"),
    ],
)
def test_wrong_values(settings, arguments, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check("--config", write_recipe(tmp_path, **settings), *arguments)


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("learning-rate", "learning_rate"),
        ("no_remove_unused_columns", "remove_unused_columns"),
        ("config", None),
        (3, None),
    ],
)
def test_names_that_work_on_the_command_line_only_are_refused_in_a_recipe(key, closest, tmp_path):
    """Nothing would read them there."""
    with pytest.raises(RecipeError, match=f"`{key}` in the recipe" + (f".*`{closest}`" if closest else "")):
        check("--config", write_recipe(tmp_path, **{"beta": 0.1}, **{str(key): True}))
    check("--learning-rate", "0.1", "--no_remove_unused_columns")


@pytest.mark.parametrize("script", [sparse_po, equilibrium_classifier, equilibrium_reward], ids=lambda s: s.__name__)
def test_an_engine_is_refused_where_nothing_is_generated(script, tmp_path):
    with pytest.raises(RecipeError, match="(?s)Unknown arguments.*`use_vllm` in .*recipe.yaml"):
        script.make_parser().check(["--config", write_recipe(tmp_path, use_vllm=True)])


def test_unknown_keys_of_a_dataset_are_refused(tmp_path):
    datasets = [{"path": "json", "data_files": "a"}, {"path": "json", "data_file": "b"}]
    with pytest.raises(RecipeError, match=r"`data_file` in `datasets\[1\]` of.*did you mean `data_files`"):
        check("--config", write_recipe(tmp_path, datasets=datasets))


def test_values_reach_the_configuration_in_their_type(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "max_steps: 3.0\nuse_cpu: 1\nbf16: 'false'\nmask_learning_rate: none\nresume_from_checkpoint: true\n"
        f"run_name: 7\nlora_target_modules: [q_proj, v_proj]\noutput_dir: {tmp_path}\n"
    )
    _, training, model, _, _ = sparse_po.make_parser().parse_args_and_config([f"--config={path}"])
    assert (training.max_steps, type(training.max_steps)) == (3, int)
    assert training.use_cpu is True and training.bf16 is False and training.mask_learning_rate is None
    assert training.run_name == "7" and model.lora_target_modules == ["q_proj", "v_proj"]
    assert last_checkpoint(training) is None  # `true`, with no checkpoint yet


def test_arguments_files_beside_the_script_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "script.args").write_text("--beta 9")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    arguments = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    assert sparse_po.make_parser().parse_args_and_config(arguments)[1].beta == 0.1


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"learning_rate: 1e-6\nuse_cpu: true\nbf16: false\noutput_dir: {tmp_path}\n")
    parsed = sparse_po.make_parser().parse_args_and_config(["--config", str(path), "--beta", "0.7"])
    assert parsed[1].learning_rate == 1e-6 and parsed[1].beta == 0.7


def test_repeated_key_missing_file_and_no_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.1\nbeta: 0.2\n")
    with pytest.raises(RecipeError, match="'beta'.*twice"):
        check("--config", str(path))
    with pytest.raises(RecipeError, match="missing.yaml` is not a file.*trl-ext recipes"):
        check("--config", "missing.yaml")
    path.write_text("- beta\n")
    with pytest.raises(RecipeError, match="must be a mapping.*list"):
        check("--config", str(path))
    with pytest.raises(RecipeError, match="`--config` needs a value"):
        check("--config")
    with pytest.raises(RecipeError, match="`--config` is given twice"):
        check("--config", "a.yaml", "--config=b.yaml")


def test_environment_is_set_only_when_the_recipe_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_TEST", "")  # so that what the test sets is taken back
    monkeypatch.delenv("TRL_EXT_TEST")
    settings = {"env": {"TRL_EXT_TEST": 3}, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
    with pytest.raises(RecipeError):
        sparse_po.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, **settings, betaa=1)])
    assert "TRL_EXT_TEST" not in os.environ
    with pytest.raises(
        ValueError, match="divergence_coef"
    ):  # refused by the configuration, which has seen the environment
        sparse_po.make_parser().parse_args_and_config(
            ["--config", write_recipe(tmp_path, **settings, divergence_coef=-1.0)]
        )
    assert "TRL_EXT_TEST" not in os.environ
    assert sparse_po.make_parser().check(["--config", write_recipe(tmp_path, **settings)]) == {"TRL_EXT_TEST": "3"}
    assert "TRL_EXT_TEST" not in os.environ
    sparse_po.make_parser().parse_args_and_config(["--config", write_recipe(tmp_path, **settings)])
    assert os.environ["TRL_EXT_TEST"] == "3"


def test_environment_stands_before_a_configuration_is_built(tmp_path, monkeypatch):
    """Building one starts the devices, which read it."""
    seen = []

    @dataclass
    class Arguments:
        size: int = 1

        def __post_init__(self):
            seen.append(os.environ.get("TRL_EXT_TEST"))

    monkeypatch.setenv("TRL_EXT_TEST", "")  # so that what the test sets is taken back
    monkeypatch.delenv("TRL_EXT_TEST")
    StrictParser(Arguments).parse_args_and_config(
        ["--config", write_recipe(tmp_path, env={"TRL_EXT_TEST": "early"}, size=2)]
    )
    assert seen == ["early"]


def test_launcher_gets_the_environment_and_passes_on_the_status(tmp_path, monkeypatch):
    calls = []

    def run(command, env, patience):
        calls.append((command, env, patience))
        return 7

    monkeypatch.setattr(cli, "run_launcher", run)
    recipe = write_recipe(tmp_path, env={"TRL_EXT_TEST": 3}, beta=0.1, model_name_or_path="x", dataset_name="x")
    assert cli.main(["sparse-po", "--config", recipe]) == 7
    assert calls[0][1]["TRL_EXT_TEST"] == "3" and "TRL_EXT_TEST" not in os.environ
    assert calls.pop()[2] == 10.0
    assert cli.main(["sparse-po", "--config", recipe, "--save_on_signal", "true"]) == 7
    assert calls[0][2] is None  # for as long as saving takes
    assert cli.main(["sparse-po", "--config", write_recipe(tmp_path, betaa=0.1)]) == 2
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": "x"}, "`model_name_or_path` is missing"),
        ({"model_name_or_path": "x"}, "No data"),
        ({"model_name_or_path": "x", "dataset_name": "x", "resume_from_checkpoint": "gone"}, "gone.*is not a folder"),
        ({"eval_strategy": "steps"}, "dataset_test_split: test.*'train'.*test_split_size"),
        ({"dataset_train_split": "learn"}, "dataset_train_split: learn.*'train'"),
    ],
)
def test_missing_parts_are_named_before_the_model_is_loaded(settings, message, tmp_path):
    if len(settings) == 1 and "split" in message:
        tiny_pairs(4).to_json(tmp_path / "data.jsonl")
        settings = {"datasets": [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}], **settings}
        settings["model_name_or_path"] = "no/such-model"
    recipe = write_recipe(tmp_path, use_cpu=True, bf16=False, output_dir=str(tmp_path / "out"), **settings)
    with pytest.raises(RecipeError, match=message):
        sparse_po.main(*sparse_po.make_parser().parse_args_and_config(["--config", recipe]))


def test_boolean_buffers_can_be_left_out_of_ddp():
    import torch

    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    model.register_buffer("scale", torch.ones(2))
    ignore_boolean_buffers(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mask"]


def test_the_end_of_a_run_names_what_lies_in_its_folder(tmp_path):
    (tmp_path / "README.md").touch()
    (tmp_path / "token_masks").mkdir()
    lines = saved_text("Model", tmp_path).splitlines()
    assert lines[0] == f"Model saved to {tmp_path}."
    assert [line.split() for line in lines[1:]] == [
        ["model", "card", str(tmp_path / "README.md")], ["token", "masks", str(tmp_path / "token_masks")],
    ]  # fmt: skip


def test_lenient_parsing_is_refused():
    with pytest.raises(ValueError, match="fail_with_unknown_args"):
        sparse_po.make_parser().parse_args_and_config([], fail_with_unknown_args=False)


def test_launch_command():
    command = cli.launch_command("module", ["--config", "r.yaml", "--accelerate_config=zero3", "--num_processes", "4"])
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[4].endswith("accelerate_configs/zero3.yaml")
    assert command[5:8] == ["--quiet", "--num_processes", "4"]
    assert command[-4:] == ["-m", "module", "--config", "r.yaml"]


def test_accelerate_configs_are_valid():
    assert {"single_process", "ddp", "zero1", "zero2", "zero3", "fsdp2", "cpu_zero2", "cpu_zero3"} <= set(
        cli.accelerate_configs()
    )
    from accelerate.commands.config.config_args import load_config_from_file

    for name in cli.accelerate_configs():
        assert load_config_from_file(cli.accelerate_config_path(name)).num_processes >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparsepo"], "unknown command 'sparsepo'.*sparse-po"),
        (["sparse-po", "--accelerate_config", "zero9"], "zero9.*neither.*zero3"),
        (["sparse-po", "--num_processes"], "needs a value"),
        (["sparse-po", "--num_processes", "two"], "num_processes two.*whole number"),
        (["sparse-po", "--num_processes", "2"], "num_processes 2.*runs one process.*zero3"),
        (["sparse-po", "--acelerate_config", "zero3"], "`acelerate_config`.*did you mean `accelerate_config`"),
        (["sparse-po", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["recipes", "nowhere"], "nowhere is neither a folder with recipes nor `show NAME`"),
        (["recipes", "shwo", "sparse_po/playground"], "shwo sparse_po/playground is neither"),
        (["recipes", "show", "sparse_po/playgroud"], "Did you mean `sparse_po/playground`"),
        (["sparse-po", "--config", "sparse_po/playgroun"], "not a file. Did you mean `sparse_po/playground`"),
        (["plan", "--config", "recipes/sparse_po/playgroun.yaml"], "Did you mean `sparse_po/playground`"),
        (["sparse_po"], "Did you mean `sparse-po`"),
        (["foo"], "unknown command 'foo'.\nThe commands are"),
        (
            [
                "constrained-ppo",
                "--config",
                "constrained_ppo/playground",
                "--constraints.0.treshold",
                "1",
                "--dry_run",
            ],
            r"`treshold` in `constraints\[0\]`.* did you mean `threshold`",
        ),
        (
            ["constrained-ppo", "--config", "constrained_ppo/playground", "--search.samplr", "random"],
            "`samplr` in `search`.* did you mean `sampler`",
        ),
        (["demo", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_help_version_recipes(capsys):
    assert cli.main(["--help"]) == 0
    assert "sparse-po" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert trl_ext.__version__ in capsys.readouterr().out
    assert cli.main(["recipes", str(ROOT / "recipes")]) == 0
    assert "playground.yaml" in capsys.readouterr().out
    assert cli.main(["sparse-po", "--help"]) == 0
    assert "--divergence_coef" in capsys.readouterr().out
    assert cli.main([]) == 2


def test_the_real_command(tmp_path):
    """`trl-ext sparse-po` launches accelerate, trains, saves, and passes on the exit status."""
    tiny_pairs(8).to_json(tmp_path / "data.jsonl")
    recipe = write_recipe(
        tmp_path,
        model_name_or_path=save_tiny_model(tmp_path / "model"),
        datasets=[{"path": "json", "data_files": str(tmp_path / "data.jsonl")}],
        output_dir=str(tmp_path / "out"),
        max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", gradient_checkpointing=False,
        logging_steps=1, beta=0.25, show_token_masks=1,
    )  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "trl_ext.cli", "sparse-po", "--config", recipe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"saved to {tmp_path / 'out'}." in done.stdout and str(tmp_path / "out" / "README.md") in done.stdout
    # By default it speaks of the run alone: a line for each logged step, a table of the masks, and where all is
    printed = (done.stdout + done.stderr).replace("\r", "\n").splitlines()
    assert not [line for line in printed if re.search("warn|deprecat|it/s", line, re.IGNORECASE)]
    assert [line for line in printed if re.match(r"1/1  loss 0.6931  accuracy .* rate ", line)] and len(printed) < 60
    assert max(len(line) for line in printed if str(tmp_path) not in line) <= 80
    assert re.search(r"\w\[\d\.\d\d\]", done.stdout)  # weights as numbers, since a pipe has no colours
    card = (tmp_path / "out" / "README.md").read_text()
    given = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert given["beta"] == 0.25 and given["output_dir"] == "out" and str(tmp_path) not in card
    assert (tmp_path / "out" / "model.safetensors").is_file() and (
        tmp_path / "out" / "token_masks.safetensors"
    ).is_file()
    failed = subprocess.run(
        [*command, "--verbose", "--resume_from_checkpoint", str(tmp_path / "nothing")],
        capture_output=True, text=True, timeout=900, env=environment,
    )  # fmt: skip
    assert failed.returncode != 0 and "is not a folder" in failed.stderr
    if Version(transformers.__version__) >= Version("5.23"):  # before, others had nothing to warn of
        assert "FutureWarning" in failed.stderr


def test_script_refuses_before_loading(tmp_path):
    recipe = write_recipe(tmp_path, model_name_or_path="no/such-model", betaa=1.0)
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext.scripts.sparse_po", "--config", recipe],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode != 0
    assert "did you mean `beta`" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("status", [0, 3, 75])
def test_slurm_launches_one_launcher_per_node(status, tmp_path):
    """With the cluster's commands replaced, the launcher of node 1 of 2 gets the recipe and overrides unharmed, and a
    run that was told to end is put into the queue again."""
    programs = {
        "scontrol": '[ "$1" = requeue ] && echo "again $2" || { echo node-a; echo node-b; }',
        "srun": 'SLURM_PROCID=1 exec "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "accelerate": f'printf "%s\\n" "$@"; [ {status} = 75 ] && echo 75 > $TRL_EXT_STATUS_FILE; exit {status}',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_GPUS_ON_NODE": "4",
    }
    arguments = ["sparse-po", "my recipe.yaml", "zero3", "--run_name", "it's $HOME"]
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "launch.slurm"), *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    launched = done.stdout.splitlines()
    assert ("again 17" in launched) == (status == 75)
    launched = [line for line in launched if line != "again 17"]
    options = dict(zip(launched[1:-10:2], launched[2:-10:2], strict=True))
    assert options["--config_file"].endswith("zero3.yaml")
    assert (options["--num_machines"], options["--num_processes"], options["--machine_rank"]) == ("2", "8", "1")
    assert options["--main_process_ip"] == "node-a"
    assert launched[-10:] == [
        "-m", "trl_ext.scripts.sparse_po", "--config", "my recipe.yaml", "--resume_from_checkpoint", "true",
        "--save_on_signal", "true", "--run_name", "it's $HOME",
    ]  # fmt: skip
