"""docs/options.md is what the configuration says."""

from tools.options_page import PAGE, page


def test_the_page_is_up_to_date_and_explains_every_option():
    text = page()
    assert PAGE.read_text() == text, "python tools/options_page.py writes it again"
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    assert len(rows) > 140
    assert not [row for row in rows if len(row.split(" | ")[-1].strip(" |")) < 8]
