"""Run the commands of a document and write their output below them.

    python -m benchmarks.record docs/benchmark.md
    python -m benchmarks.record docs/benchmark.md --only pvt_v2_b2

A command is a ``bash`` block followed by ``<!-- printed -->``; everything from there to
``<!-- /printed -->`` is replaced. Commands run in the present folder, which has to be the root of
the repository for ``python -m benchmarks.speed``. The document is written after each command; if a
command fails, its earlier output stays.
"""

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(
    r'```bash\n(?P<command>(?:(?!```).)*?)```\n\n'
    r'(?P<printed><!-- printed[^>]* -->\n.*?<!-- /printed -->)',
    re.DOTALL,
)


def record(document: Path, only: str = '') -> None:
    """Run the commands that match ``only``, in order.

    Args:
        document: A Markdown file.
        only: A regular expression; '' runs every command.
    """
    commands = [match['command'] for match in BLOCK.finditer(document.read_text('utf-8'))]
    for command in commands:
        if not re.search(only, command):
            continue
        print(command, file=sys.stderr, flush=True)
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', command], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(
                f'exit status {done.returncode}; {document} keeps the earlier output of:\n{command}'
            )
        date = datetime.date.today().isoformat()
        text = re.sub(r'\s*\n(\s*\n)+', '\n\n', done.stdout.strip())  # one empty line is enough
        printed = f'<!-- printed {date} -->\n{text}\n<!-- /printed -->'

        def replace(match: re.Match, command: str = command, printed: str = printed) -> str:
            if match['command'] != command:
                return match[0]
            return match[0].replace(match['printed'], printed)

        # Read again: a command takes minutes, in which the document may have been edited.
        document.write_text(BLOCK.sub(replace, document.read_text('utf-8')), 'utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('document', type=Path)
    parser.add_argument('--only', default='', help='a regular expression')
    args = parser.parse_args()
    record(args.document, args.only)


if __name__ == '__main__':
    main()
