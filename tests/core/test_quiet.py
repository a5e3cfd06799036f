"""What a run keeps back by default, what it says, and that all is as before when it is over."""

import logging
import warnings

import pytest
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, trainer

from trl_ext.core.quiet import VERBOSE_VARIABLE, quiet_environment, quiet_run
from trl_ext.core.short_log import WIDTH, ShortLogCallback, short_line


def speak():
    warnings.warn("`a` is deprecated", FutureWarning, stacklevel=1)
    warnings.warn("`beta` is 0, so nothing is learned", UserWarning, stacklevel=1)
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU")
    logging.getLogger("DeepSpeed").warning("a gradient has overflowed")


@pytest.mark.parametrize("verbose", [False, True])
def test_only_what_libraries_say_of_themselves_is_kept_back(verbose, caplog, capsys):
    before = tqdm.__init__
    with warnings.catch_warnings(record=True) as heard, caplog.at_level("WARNING"):
        warnings.simplefilter("always")
        with quiet_run(verbose):
            speak()
            list(tqdm(range(3), desc="Short work"))
            shown = trainer.DEFAULT_PROGRESS_CALLBACK, trainer.PrinterCallback
    kept = [str(one.message) for one in heard] + [record.getMessage() for record in caplog.records]
    expected = ["`beta` is 0, so nothing is learned", "a gradient has overflowed"]
    assert kept == expected if not verbose else len(kept) == 4
    assert ("Short work" in capsys.readouterr().err) == verbose
    assert shown == ((ProgressCallback, PrinterCallback) if verbose else (ShortLogCallback,) * 2)
    assert trainer.DEFAULT_PROGRESS_CALLBACK is ProgressCallback and trainer.PrinterCallback is PrinterCallback
    assert tqdm.__init__ is before and not logging.getLogger("DeepSpeed").filters


def test_verbose_by_the_environment(monkeypatch):
    monkeypatch.setenv(VERBOSE_VARIABLE, "1")
    with quiet_run():
        assert trainer.PrinterCallback is PrinterCallback


def test_filters_of_the_environment_win():
    quiet = quiet_environment({"PYTHONWARNINGS": "error::FutureWarning"})["PYTHONWARNINGS"]
    assert quiet.split(",")[0] == "ignore::FutureWarning" and quiet.endswith(",error::FutureWarning")
    assert quiet_environment({})["PYTHONWARNINGS"].count("ignore") == 3


def test_a_log_entry_is_one_line():
    logs = {"loss": 0.69314, "grad_norm": 2.0, "learning_rate": 2e-5, "rewards/accuracies": 0.5, "mask/x": 1.0}
    assert short_line(logs, 7, 120) == "  7/120  loss 0.6931  accuracy 0.5  gradient 2  rate 2e-05"
    logs = {"eval_loss": 0.5, "eval_gold": 0.25, "eval_runtime": 3.0}
    assert short_line(logs, 120, 120) == "120/120  evaluation  loss 0.5  gold 0.25"
    logs = {"train_runtime": 61.4, "train_samples_per_second": 2.5, "train_loss": 0.1}
    assert short_line(logs, 2, 2) == "2/2  trained in 1:01 minutes, 2.5 rows a second"
    # What does not fit is left out whole, and a quantity under two keys stands once
    many = dict.fromkeys(
        ("loss", "reward", "gold", "rewards/accuracies", "accuracy", "kl/per_response", "kl"), 0.12345
    )
    many |= dict.fromkeys(("kl/chosen", "optimizer/projected/share", "grad_norm", "learning_rate"), 0.12345)
    line = short_line(many, 100, 100)
    assert len(line) <= WIDTH and line.count("accuracy") == line.count(" KL 0") == 1 and line.endswith("0.1235")
