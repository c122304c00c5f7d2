import os
import subprocess
import sys

import pytest
from checks import BACKEND

SCRIPT = """
import os
import torch
from keras_mmfnet.cli.memory import keep_freed_memory

def kept():
    tensor = torch.ones(100 << 20, dtype=torch.uint8)
    del tensor
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

before, done = kept(), keep_freed_memory()
print(done, kept() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells what memory a process holds")
def test_memory_stays_with_the_process_on_pytorch():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    answer, mebibytes = done.stdout.split()
    if BACKEND == "torch":
        assert answer == "True"
        assert 90 < int(mebibytes) < 400
    else:
        # The others keep theirs by themselves.
        assert answer == "False"
        assert int(mebibytes) < 50
