"""A recipe that fails is named with its line and the error."""

import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.run.config import load_recipe


@pytest.mark.parametrize(
    "text, message",
    [
        ("def recipe():\n    x = {}\n    return x['size']\n", ", line 3: KeyError: 'size'"),
        ("def helper():\n    1 / 0\n\nhelper()\n", ", line 2: ZeroDivisionError: division by zero"),
        ("\ndef recipe(:\n", ", line 2: SyntaxError: invalid syntax"),
        ("import megatron_dlm_nowhere\n", ", line 1: ModuleNotFoundError: No module named"),
        (
            "import json\ndef recipe():\n    return json.loads('{')\n",
            ", line 3: JSONDecodeError: Expecting property name",
        ),
        (
            "from megatron_dlm.models.config import ModelConfig\n"
            "def recipe():\n    return ModelConfig(depth=3)\n",
            ", line 3: TypeError: ModelConfig.__init__() got an unexpected keyword argument 'depth'",
        ),
        ("\0", ": SyntaxError: source code string cannot contain null bytes"),
        ("x = 1\n", ": has no function recipe() -> RunConfig"),
        ("def recipe():\n    return 3\n", ": recipe() returned int, not a RunConfig"),
    ],
)
def test_a_recipe_that_fails_is_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"recipe: {path}{message}")
    assert "\n" not in str(raised.value)


def test_a_wrong_value_in_a_recipe_is_told_by_its_field_alone(tmp_path):
    """Also from a recipe that a recipe loads."""
    inner, outer = tmp_path / "inner.py", tmp_path / "outer.py"
    inner.write_text(
        "from megatron_dlm.run.lr_schedule import LrScheduleConfig\n"
        "def recipe():\n    return LrScheduleConfig(min_lr=-1.0)\n"
    )
    outer.write_text(
        "from pathlib import Path\nfrom megatron_dlm.run.config import load_recipe\n"
        "def recipe():\n    return load_recipe(Path(__file__).with_name('inner.py'))\n"
    )
    with pytest.raises(InputError) as raised:
        load_recipe(outer)
    assert str(raised.value).startswith("schedule.min_lr: -1.0")
