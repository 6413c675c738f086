#!/usr/bin/env python
"""Report a run as one HTML file: figures, curves, pictures with detections, config, versions.

    python tools/report.py output/hierkd_R50
    python tools/report.py output/demo/hierkd --output hierkd.html --pictures 24

Takes any folder that train_net.py has written to: of a run that has ended, was killed, is still
going on, or was only evaluated. What is not there is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import one_line_errors, run_command


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="OUTPUT_DIR of a run")
    parser.add_argument("--output", type=Path, help="the file; default: RUN_DIR/report.html")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--pictures", type=int, default=12, help="how many; default: 12")
    pictures.add_argument(
        "--no-pictures", dest="pictures", action="store_const", const=0, help="none"
    )
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Read the folder of a run and write the file."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.pictures < 0:
        parser.error(f"--pictures must be 0 or more, got {args.pictures}")
    from detectron2.utils.logger import setup_logger

    from hierkd.reports.page import write_page
    from hierkd.reports.report import describe_run
    from hierkd.reports.run_record import read_run

    setup_logger(name="hierkd", abbrev_name="hierkd").setLevel(logging.WARNING)
    page = describe_run(read_run(args.run), num_pictures=args.pictures)
    output = args.output or args.run / "report.html"
    write_page(output, page)
    for note in page.sections[0].notes:
        print(f"note: {note}")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
