"""What `verify` claims: for each kind of change to an output, whether it fails, is noted, or is not looked at.

| what was changed, removed or added | with base and adapters | by the receipt |
|---|---|---|
| a tensor: bits, dtype, shape, name | fails, recomputed | fails, by its file's hash |
| the head of a file of weights, its remarks among it | fails | fails |
| config.json, index, tokenizer and all else that was written beside the weights, to the last byte | fails | fails |
| lorafold.json, to the last byte | fails | fails |
| a file that a program may read: weights, configurations, tokenizers, templates, adapters, code | fails | fails |
| README.md, the model card | noted | noted |
| documents, pictures, hidden files and folders that were added | noted | noted |
| lorafold.json, and the hash in it to match | fails, but for `REWRITTEN` | not covered |
| times, permissions and owners of files; empty folders; a file that became a link to the same bytes | not covered | not covered |

Overlays (`--only-changed`), outputs of a single file and the components of pipelines are held to the same table. A merge with
`--no-verify` writes no hashes of weights, and can be verified with base and adapters alone.
"""

from __future__ import annotations

REWRITTEN = (
    "the version, names of folders, and options that make no bit differ",
    "numbers of what was kept, beyond their third digit",
    "fields and hashes that it leaves out",
)
"""What a receipt may say that cannot be computed anew; its own hash shows a change all the same."""

_ALWAYS = (
    "README.md, documents, pictures and hidden files: a change is noted, and does not fail",
    "times, permissions and owners of files, empty folders, and links in place of files",
)


def not_covered(*, by_receipt: bool, only_changed: bool = False) -> tuple[str, ...]:
    """What is not covered, in words; `by_receipt`: without base and adapters, `only_changed`: of an overlay."""
    if not by_receipt:
        return (f"in a lorafold.json whose own hash was rewritten as well: {'; '.join(REWRITTEN)}", *_ALWAYS)
    found = ["whether it is what base and adapters make, and a lorafold.json whose own hash was rewritten: give both for that"]
    if only_changed:
        found.append("the base that the overlay is for: give it, and the adapters")
    return (*found, *_ALWAYS)
