"""A bag-of-bigrams ranker for each user of prepared data: what word counts alone reach, beside a policy's accuracy.

python examples/bigram_ranker.py DIR; DIR is a directory made by `prlhf data prepare`. For each user a logistic model of
the difference in word and bigram counts between two responses is fitted to the training rows, the penalty chosen on
`dev.jsonl`, and the accuracy on `eval_seen.jsonl` is printed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.data.prepared import load_prepared
from prlhf.data.records import PreferenceRow

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the squared weights, beside the mean loss of a row
MIN_ROWS = 2  # training rows that a feature must differ in


def count_features(text: str) -> Counter[str]:
    """Words, punctuation marks and pairs of neighbours in a text, lower case."""
    words = ["<", *re.findall(r"\w+|[^\w\s]", text.lower()), ">"]
    return Counter([*words, *map(" ".join, zip(words, words[1:], strict=False))])


def difference(row: PreferenceRow) -> Counter[str]:
    """Counts of the chosen response minus those of the rejected one; without the features that do not differ."""
    counts = count_features(row.chosen)
    counts.subtract(count_features(row.rejected))
    return Counter({feature: count for feature, count in counts.items() if count})


def rank_accuracies(
    train: Sequence[PreferenceRow], dev: Sequence[PreferenceRow], held_out: Sequence[PreferenceRow]
) -> dict[str, float]:
    """Accuracy of each user's own ranker on the held-out rows; a tie counts one half."""
    accuracies = {}
    for user in dict.fromkeys(row.user_id for row in held_out):
        own = [[difference(row) for row in rows if row.user_id == user] for rows in (train, dev, held_out)]
        seen = Counter(feature for row in own[0] for feature in row)
        columns = {feature: i for i, feature in enumerate(f for f, count in seen.items() if count >= MIN_ROWS)}
        train_x, dev_x, held_out_x = (_matrix(rows, columns) for rows in own)
        fits = [_fit(train_x, penalty) for penalty in PENALTIES]
        best = max(fits, key=lambda weights: _accuracy(dev_x, weights)) if len(dev_x) else fits[len(fits) // 2]
        accuracies[user] = _accuracy(held_out_x, best)
    return accuracies


def _matrix(rows: Sequence[Counter[str]], columns: dict[str, int]) -> Tensor:
    matrix = torch.zeros(len(rows), len(columns))
    for i, row in enumerate(rows):
        for feature in row.keys() & columns.keys():
            matrix[i, columns[feature]] = row[feature]
    return matrix


def _fit(differences: Tensor, penalty: float) -> Tensor:
    """Weights of the least -log sigmoid(x w) + penalty |w|^2; convex, so L-BFGS finds the minimum."""
    weights = torch.zeros(differences.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(differences @ weights).mean() + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _accuracy(differences: Tensor, weights: Tensor) -> float:
    margins = differences @ weights
    return float(((margins > 0).float() + 0.5 * (margins == 0)).mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    data = load_prepared(parser.parse_args(argv).directory)
    for user, accuracy in rank_accuracies(data.train, data.dev, data.eval_seen).items():
        sys.stdout.write(f"{user} {accuracy:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
