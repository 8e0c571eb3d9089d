"""`python -m sdp_llm.config` prints the table of all keys as markdown."""

from __future__ import annotations

from sdp_llm.config.describe import markdown_table

if __name__ == "__main__":
    print(markdown_table())
