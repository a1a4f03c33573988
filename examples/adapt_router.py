"""Let the routers of a quantized model learn from its 16-bit original; minutes on two cores.

python examples/adapt_router.py [FOLDER_OR_HUB_ID] [TEXT_FILE ...]
"""

import sys
import tempfile
from pathlib import Path

import qmoe
from qmoe_convert.convert import convert

original = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-moe"
# Any text of the kind that the model is used for; here this Python's own sources.
texts = sys.argv[2:] or [str(Path(tempfile.__file__).with_name(f"{n}.py")) for n in ("ast", "enum")]

with tempfile.TemporaryDirectory() as folder:
    converted, adapted = Path(folder, "int8"), Path(folder, "adapted")
    convert(original, converted, weights="int8")
    result = qmoe.adapt_router(
        converted, adapted, teacher=original, data=texts, steps=20, window=256, say=print
    )
    model = qmoe.load(adapted)  # a checkpoint like any other

before, after = result.before, result.after
print(f"held-out KL {before.kl:.5f} -> {after.kl:.5f}")
print(f"perplexity {before.perplexity:.3f} -> {after.perplexity:.3f}")
if after.step == 0:
    print("Nothing was better than the start, as is usual for INT8: the routers are as they were.")
