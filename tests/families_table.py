"""README's table of families and schemes, drawn from what the tests are parametrized over.

``python -m tests.families_table`` writes it into README.md.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from pymoe.ops.quantize.schemes import CASTS, SCHEMES
from tests.checkpoint.families import FLOATS, FORMS, FP8
from tests.checkpoint.test_requantize import NAMES
from tests.interop.models import CASES
from tests.interop.test_transformers import FP8_FAMILIES

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- families: written by python -m tests.families_table -->\n", "<!-- end of families -->\n")
TITLES = {"Mixtral": ("mixtral",), "Qwen3-MoE": ("qwen3_moe",), "Qwen2-MoE": ("qwen2_moe",),
          "DeepSeek-V3": ("deepseek_v3",), "gpt-oss": ("gpt_oss",), "Llama 4": ("llama4", "llama4_text")}  # fmt: skip


def table() -> str:
    """Return the table and the lines under it."""
    assert set(NAMES) >= {*SCHEMES, *CASTS} and {family for group in TITLES.values() for family in group} == set(FORMS)
    rows = ["| family | fp32, fp16, bf16 | fp8 in 128 x 128 | mxfp4 | compared with transformers |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for title, families in TITLES.items():
        forms = set.intersection(*(set(FORMS[family]) for family in families))
        cells = ["stored" if stored <= forms else "made" for stored in (set(FLOATS), {FP8}, {"mxfp4"})]
        count = sum(case.family in families for case in CASES)
        also = [FP8] * (families[0] in FP8_FAMILIES) + ["mxfp4"] * (families[0] == "gpt_oss")
        cells.append(", ".join([f"{count} configurations", *also]))
        rows.append(f"| {' | '.join([title, *cells])} |")
    names = ", ".join(f"`{name}`" for name in (*SCHEMES, *CASTS))
    text = (
        "*Stored*: read as it lies on disk. *Made*: `scheme=` quantizes on the way from whatever is stored, an expert "
    )
    text += f"at a time. It makes {names}."
    lines = textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*rows, "", *lines]) + "\n"


def written() -> str:
    """Return what README holds between the marks."""
    found = re.search(f"{re.escape(MARKS[0])}(.*?){re.escape(MARKS[1])}", README.read_text("utf-8"), re.S)
    assert found, "README.md has lost its marks"
    return found[1]


if __name__ == "__main__":
    old, new = ("".join((MARKS[0], text, MARKS[1])) for text in (written(), table()))
    README.write_text(README.read_text("utf-8").replace(old, new), "utf-8")
