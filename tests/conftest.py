"""What tests of several scripts share."""
import contextlib

import numpy as np
import pytest

import common


@contextlib.contextmanager
def stopped(when):
    """Ctrl-C just before the first checkpoint of which when(step) is true."""
    checkpoint = common.Folder.checkpoint

    def asked(self, fused, step, *rest, **more):
        self.stop["asked"] |= when(step)
        return checkpoint(self, fused, step, *rest, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Folder, "checkpoint", asked)
        yield


def arrays_of(path):
    """Every number that a run leaves, by file."""
    return {f"{file.relative_to(path)} {k}": v for file in sorted(path.rglob("*.npz")) for k, v in np.load(file).items()}


def alike(a, b):
    """Whether two run folders hold the same bits."""
    x, y = arrays_of(a), arrays_of(b)
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k], equal_nan=x[k].dtype.kind == "f") for k in x)


def cut(main, line, when, path):
    """Whether a run that is stopped and resumed leaves the same bits as one in one piece; with the steps of its first part."""
    whole, halves = (path / name for name in ("whole", "cut"))
    assert main([*line, "--out", str(whole)]) == 0
    with stopped(when):
        assert main([*line, "--out", str(halves)]) == 130
    first = len(np.load(next(halves.rglob("metrics.npz")))["loss"])
    assert main([*line, "--out", str(halves), "--resume"]) == 0
    return alike(whole, halves), first
