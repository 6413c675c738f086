"""What the paper, ATSS and COCO define, as plain loops over Python numbers.

Written from the definitions alone, to be read beside them; nothing of the package, of torch or of
detectron2 is used. Boxes are (x0, y0, x1, y1) unless said otherwise.
"""

import math
from fractions import Fraction

# ------------------------------------------------------------------------------------- boxes


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0 * width


def iou(a, b):
    both = intersection(a, b)
    return both / (area(a) + area(b) - both)


def giou(a, b):
    """Rezatofighi et al.: IoU minus the part of the hull that neither box covers."""
    both = intersection(a, b)
    union = area(a) + area(b) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union - (hull - union) / hull


# ------------------------------------------------------------------- assignment (ATSS, Algorithm 1)


class UndeterminedError(Exception):
    """The definition leaves this case open: a tie decides which anchors are candidates."""


def atss(objects, levels, k, *, margin=Fraction(1, 100), tolerance=Fraction(1, 10**5)):
    """Which object each anchor may be given to, in exact arithmetic.

    The threshold is mean + standard deviation (with n - 1, as ATSS's authors compute it) and has a
    root in it; ``iou >= mean + std`` is decided by squares. Where float32 cannot tell, both answers
    are allowed.

    Args:
        objects: boxes of integers or Fractions.
        levels: anchors of each level, likewise.
        k: candidates per level.
        margin: how far inside the object an anchor's centre has to be, in pixels.
        tolerance: of IoUs.

    Returns:
        For each anchor the set of allowed owners; None in it: background.
    """
    anchors = [tuple(map(Fraction, a)) for level in levels for a in level]
    claims = [[] for _ in anchors]  # of each anchor: (object, IoU, whether it is certain)
    for number, given in enumerate(objects):
        box = tuple(map(Fraction, given))
        candidates, start = [], 0
        for level in levels:
            indices = range(start, start + len(level))
            start += len(level)
            distance = {i: _squared_distance(_centre(anchors[i]), _centre(box)) for i in indices}
            nearest = sorted(indices, key=distance.__getitem__)
            if len(nearest) > k and distance[nearest[k - 1]] == distance[nearest[k]]:
                raise UndeterminedError
            candidates += nearest[:k]
        ious = {i: iou(anchors[i], box) for i in candidates}
        n = len(ious)
        mean = sum(ious.values()) / n
        variance = sum((x - mean) ** 2 for x in ious.values()) / (n - 1) if n > 1 else Fraction(0)
        for i, value in ious.items():
            x, y = _centre(anchors[i])
            room = min(x - box[0], y - box[1], box[2] - x, box[3] - y)
            if abs(room - margin) < tolerance:
                raise UndeterminedError
            surely = _reaches(value - tolerance, mean, variance)
            maybe = _reaches(value + tolerance, mean, variance)
            if room > margin and maybe:
                claims[i].append((number, value, surely))
    return [_owners(of_anchor, tolerance) for of_anchor in claims]


def _reaches(value, mean, variance):
    return value >= mean and (value - mean) ** 2 >= variance


def _owners(claims, tolerance):
    """The highest IoU wins; claims that are not certain may be missing."""
    floor = max((value for _, value, certain in claims if certain), default=None)
    owners = {n for n, value, _ in claims if floor is None or value >= floor - tolerance}
    return owners if floor is not None else owners | {None}


def _centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _squared_distance(a, b):
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


# --------------------------------------------------------------------------- losses of the paper


def normalised(vector):
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def log_sum_exp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def softmax(values):
    total = log_sum_exp(values)
    return [math.exp(v - total) for v in values]


def logits(embedding, texts, background, scale):
    """Eq. 1 before its softmax: scaled cosines with the texts and, last, the background."""
    unit = normalised(embedding)
    return [scale * dot(unit, normalised(row)) for row in [*texts, background]]


def focal(logit_rows, labels, gamma, alpha):
    """Sum over points of alpha * (1 - p)^gamma * -log p, p the softmax of the right class."""
    total = 0.0
    for row, label in zip(logit_rows, labels, strict=True):
        log_p = row[label] - log_sum_exp(row)
        total += alpha * (1 - math.exp(log_p)) ** gamma * -log_p
    return total


def weighted_giou(predictions, objects, weights):
    return math.fsum(
        w * (1 - giou(p, o)) for p, o, w in zip(predictions, objects, weights, strict=True)
    )


def binary_cross_entropy(scores, targets):
    """Sum of -t log s(x) - (1 - t) log(1 - s(x)), s the logistic function."""
    return math.fsum(
        t * log_sum_exp([0.0, -x]) + (1 - t) * log_sum_exp([0.0, x])
        for x, t in zip(scores, targets, strict=True)
    )


def embedding_distance(students, teachers, norm):
    """Eq. 2 as a sum: of the L1 distances, or of the L2 distances, not squared."""
    total = 0.0
    for f, v in zip(students, teachers, strict=True):
        differences = [a - b for a, b in zip(f, v, strict=True)]
        if norm == 1:
            total += math.fsum(map(abs, differences))
        else:
            total += math.sqrt(math.fsum(d * d for d in differences))
    return total


def patches(maps, grid, pooling):
    """Unit vectors of the G x G cells of every level of one image.

    Args:
        maps: per level, D planes of rows.
        grid: G. Cell i of n rows reaches from floor(i n / G) to ceil((i + 1) n / G).
        pooling: "max" or "avg".
    """
    found = []
    for level in maps:
        rows, columns = len(level[0]), len(level[0][0])
        for i in range(grid):
            for j in range(grid):
                cell = [
                    (y, x)
                    for y in range(i * rows // grid, -(-(i + 1) * rows // grid))
                    for x in range(j * columns // grid, -(-(j + 1) * columns // grid))
                ]
                values = [[plane[y][x] for y, x in cell] for plane in level]
                if pooling == "max":
                    vector = [max(v) for v in values]
                else:
                    vector = [math.fsum(v) / len(v) for v in values]
                found.append(normalised(vector))
    return found


def match_score(image_patches, caption, scale):
    """Eq. 3, the image as the caption looks at it, and Eq. 4, its cosine with the caption."""
    attention = softmax([dot(caption, patch) for patch in image_patches])
    aggregated = [
        math.fsum(a * patch[d] for a, patch in zip(attention, image_patches, strict=True))
        for d in range(len(caption))
    ]
    return scale * dot(normalised(aggregated), caption)


def contrast(scores):
    """Eq. 5: (image term, caption term)."""
    n = len(scores)
    by_image = math.fsum(log_sum_exp(scores[i]) - scores[i][i] for i in range(n)) / n
    columns = [[scores[i][j] for i in range(n)] for j in range(n)]
    by_caption = math.fsum(log_sum_exp(columns[j]) - scores[j][j] for j in range(n)) / n
    return by_image, by_caption


# ---------------------------------------------------------------------------------- inference


def detections(boxes, probabilities, qualities, *, score_thresh, topk_pairs, nms, limit):
    """Best pairs of box and class, greedy suppression within each class, best detections.

    Returns:
        (score, row, class), best first.
    """
    pairs = sorted(
        (
            (p * quality, row, number)
            for row, (of_row, quality) in enumerate(zip(probabilities, qualities, strict=True))
            for number, p in enumerate(of_row)
            if p > score_thresh
        ),
        reverse=True,
    )
    kept = []
    for score, row, number in pairs[: topk_pairs or None]:
        rivals = [boxes[r] for _, r, c in kept if c == number]
        if all(iou(boxes[row], rival) <= nms for rival in rivals):
            kept.append((score, row, number))
    return kept[:limit]


# ------------------------------------------------------------------------------ COCO's evaluation

THRESHOLDS = [(50 + 5 * i) / 100 for i in range(10)]
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


def coco_class(truth, found, image_ids, *, threshold, area_range, max_dets):
    """Average precision (101 points) and recall of one class at one IoU threshold.

    Args:
        truth: annotations of the class: ``image_id``, ``bbox`` (XYWH), ``area``, ``iscrowd``.
        found: detections of the class: ``image_id``, ``bbox`` (XYWH), ``score``.
        image_ids: the images that count.
        threshold: a match has at least this IoU.
        area_range: others neither help nor hurt.
        max_dets: per image, best first.

    Returns:
        (AP, recall), each 0..1; None, None without an object that counts.
    """
    low, high = area_range
    objects, verdicts = 0, []  # verdicts: (score, whether right), best first in each image
    for image_id in sorted(image_ids):
        here = []
        for annotation in (t for t in truth if t["image_id"] == image_id):
            counts = not annotation["iscrowd"] and low <= annotation["area"] <= high
            here.append({**annotation, "counts": counts, "taken": False})
        here.sort(key=lambda each: not each["counts"])  # those that count come first
        objects += sum(each["counts"] for each in here)
        best_first = sorted(
            (f for f in found if f["image_id"] == image_id), key=lambda f: -f["score"]
        )
        for detection in best_first[:max_dets]:
            match = _match(detection, here, threshold)
            if match is not None:
                match["taken"] = True
                counts = match["counts"]
            else:
                counts = low <= detection["bbox"][2] * detection["bbox"][3] <= high
            if counts:
                verdicts.append((detection["score"], match is not None))
    if objects == 0:
        return None, None
    verdicts.sort(key=lambda verdict: -verdict[0])
    precisions, recalls, right = [], [], 0
    for number, (_, is_right) in enumerate(verdicts, start=1):
        right += is_right
        precisions.append(right / number)
        recalls.append(right / objects)
    # precision at a recall is the best at that recall or a higher one
    points = [
        max((p for p, r in zip(precisions, recalls, strict=True) if r >= i / 100), default=0.0)
        for i in range(101)
    ]
    return sum(points) / 101, right / objects


def _match(detection, annotations, threshold):
    """The annotation of highest IoU, one that counts before one that does not; the last of equals.

    Of a crowd, which can be matched again and again, the "IoU" is over the detection's area.
    """
    best, best_iou = None, threshold
    for annotation in annotations:
        if annotation["taken"] and not annotation["iscrowd"]:
            continue
        if best is not None and best["counts"] and not annotation["counts"]:
            break
        overlap = _coco_iou(detection["bbox"], annotation["bbox"], annotation["iscrowd"])
        if overlap >= best_iou:
            best, best_iou = annotation, overlap
    return best


def _coco_iou(a, b, crowd):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - both)
