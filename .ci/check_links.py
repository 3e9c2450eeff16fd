"""Fail on a relative link or picture in a Markdown file that git does not track."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

# [text](target "title"), ![picture](target), [name]: target, <img src="target">
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]:\s*(\S+)|<(?:a|img)[^>]+(?:href|src)=[\"']([^\"']+)", re.MULTILINE)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def main() -> int:
    tracked = {Path(name) for name in subprocess.check_output(["git", "ls-files", "-z"], text=True).split("\0") if name}
    folders = {parent for path in tracked for parent in path.parents}
    broken = 0
    for page in sorted(path for path in tracked if path.suffix == ".md"):
        text = CODE.sub("", page.read_text())
        for found in LINK.finditer(text):
            target = unquote(next(filter(None, found.groups()))).partition("#")[0]
            if not target or re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            path = Path(str((Path("/") / page.parent / target).resolve())[1:])
            if path not in tracked and path not in folders:
                print(f"{page}: {target} is not tracked by git; commit it, or mend the link", file=sys.stderr)
                broken += 1
    print(f"{broken} broken links in Markdown files.")
    return int(broken > 0)


sys.exit(main())
