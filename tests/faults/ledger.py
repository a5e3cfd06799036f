"""What was tried and what came of it, one line of JSON each, so that a harness that was ended goes on where it was."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path


BAD = ("different", "traceback", "unclear", "stuck")


class Ledger:
    """
    Cases that were tried.

    Args:
        path (`Path`, *optional*):
            File that each case is written to as it ends, and that those of an earlier run are read from.
        seconds (`float`, *optional*):
            After which no further case is begun.
    """

    def __init__(self, path: Path | None = None, seconds: float | None = None):
        self._path, self._end = path, None if seconds is None else time.monotonic() + seconds
        lines = path.read_text().splitlines() if path is not None and path.is_file() else []
        self.found = {entry["case"]: entry for entry in map(json.loads, lines)}
        self.out_of_time = False

    def left(self, cases: Iterable[str]) -> Iterator[str]:
        """Those of the cases that were not tried, until the time is over."""
        for case in cases:
            if case in self.found:
                continue
            if self._end is not None and time.monotonic() > self._end:
                self.out_of_time = True
                return
            yield case

    def note(self, case: str, verdict: str, kills: int = 0) -> str:
        """Keeps what came of a case, whose first words are the fault and the command; gives its verdict."""
        self.found[case] = {"case": case, "verdict": verdict, "kills": kills}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(self.found[case]) + "\n")
        if verdict in BAD:
            print(f"  {case}: {verdict}", flush=True)
        return verdict

    def counts(self, fault: str, command: str | None = None) -> Counter:
        """Cases by verdict, and kills, of a fault and of one command or all."""
        total: Counter = Counter()
        for entry in self.found.values():
            words = entry["case"].split()
            if words[0] == fault and command in (None, words[1]):
                total[entry["verdict"]] += 1
                total["kills"] += entry["kills"]
        return +total

    def bad(self) -> list[str]:
        return [case for case, entry in self.found.items() if entry["verdict"] in BAD]
