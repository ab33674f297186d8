"""Each message of docs/troubleshooting.md is one of the code's."""

import ast
import re

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"


def texts_of_the_code():
    """String literals of the package, what is filled in as "..."."""
    for path in sorted((ROOT / "megatron_dlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def messages():
    for line in PAGE.read_text().splitlines():
        found = re.match(r"\| (?:`` (.*?) ``|`(.*?)`) \|", line)
        if found:
            yield found[1] or found[2]


def test_every_message_is_in_the_code():
    texts = [text for text in texts_of_the_code() if len(text) > 8]
    pattern_of = {
        message: re.compile(".*".join(map(re.escape, message.split("...")))) for message in messages()
    }
    assert len(pattern_of) >= 30
    missing = [
        message for message, pattern in pattern_of.items() if not any(pattern.search(text) for text in texts)
    ]
    assert not missing
