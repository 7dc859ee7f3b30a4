"""The commands `prlhf export` and `prlhf users`; what they need is imported when they run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prlhf.errors import ConfigError

if TYPE_CHECKING:
    from prlhf.evaluation.users import KnownUser
    from prlhf.models import PersonalizedModel


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf export`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run or checkpoint directory")
    parser.add_argument("--format", required=True, choices=("peft", "merged", "vllm"),
                        help="peft: the adapter; merged: all weights; vllm: the adapter and how to serve it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the export appears")


def run_export(args: argparse.Namespace) -> int:
    """Export, and say where it is."""
    from prlhf.serving.export import export_checkpoint

    export_checkpoint(args.checkpoint, args.format, args.out)
    sys.stdout.write(f"{args.out}\n")
    return 0


def add_users_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf users`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run or checkpoint directory")
    parser.add_argument("--nearest", metavar="ID", help="who is most like this user")
    parser.add_argument("--map", type=Path, metavar="FILE.png", help="draw all users in a plane; needs matplotlib")
    parser.add_argument("--colour", choices=("accuracy", "cluster"),
                        help="of the map (default: cluster where there are clusters, else accuracy)")


def run_users(args: argparse.Namespace) -> int:
    """List the users, the worst served first; or the nearest ones of one; and draw the map.

    Raises: ConfigError: a map by clusters of a model without any, a colour without a map, or matplotlib is missing.
        RunDirError: a map where no file can be.
    """
    from prlhf.evaluation.users import format_neighbours, format_sources, format_users, load_users, nearest_users
    from prlhf.files import check_can_appear

    if args.map is not None:
        check_can_appear(args.map)
    elif args.colour is not None:
        raise ConfigError("--colour: is of the map; give --map FILE.png, too")
    model, users = load_users(args.checkpoint)
    if args.map is not None:
        _draw_map(args, model, users)
    if args.nearest is not None:
        sys.stdout.write(format_neighbours(args.nearest, nearest_users(model, args.nearest)))
    elif args.map is None:
        sys.stdout.write(format_users(users) + format_sources(args.checkpoint))
    return 0


def _draw_map(args: argparse.Namespace, model: PersonalizedModel, users: list[KnownUser]) -> None:
    from prlhf.evaluation.figures import draw_map, require_matplotlib, save_png
    from prlhf.evaluation.users import compute_user_map

    require_matplotlib("prlhf users --map")
    has_clusters = users[0].cluster is not None
    if args.colour == "cluster" and not has_clusters:
        raise ConfigError(f"--colour cluster: the users of {args.checkpoint} are in no clusters; use accuracy")
    by_cluster = args.colour == "cluster" or (args.colour is None and has_clusters)
    by_id = {user.user_id: user for user in users}
    in_order = [by_id[user_id] for user_id in model.users.user_ids] if model.users else []
    places = compute_user_map(model.known_prompts())
    save_png(lambda figure: draw_map(figure, places, in_order, by_cluster=by_cluster), args.map)
    sys.stdout.write(f"{args.map}\n")
