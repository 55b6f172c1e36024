"""Pictures with questions: photographs that come with scikit-image, and text and charts drawn here."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from effarch.clip.images import bundled_photographs

WORDS = ("river copper window seventeen market orange bridge silent harbour planet velvet thunder garden mirror lantern "
         "ticket walnut summer engine pebble compass ribbon saddle cotton").split()


@dataclass
class Question:
    """A picture, what is asked about it, and its kind: photo, text or chart."""

    name: str
    kind: str
    picture: Image.Image
    text: str

    def __str__(self):
        return self.name


def page(seed, side=448):
    """A page of a few lines of random words and numbers."""
    random, image = np.random.default_rng(seed), Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=side // 18)
    for line in range(8):
        text = " ".join([*random.choice(WORDS, 3), str(random.integers(100, 1000))])
        draw.text((side // 20, side // 20 + line * side // 9), text, fill="black", font=font)
    return image


def chart(seed, side=448):
    """A bar chart of six named values."""
    random, image = np.random.default_rng(seed), Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=side // 24)
    names, values = random.choice(WORDS, 6, replace=False), random.integers(10, 100, 6)
    step, floor = side // 7, side * 5 // 6
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        left, top = (i + 1) * step - step // 2, floor - int(value) * side * 7 // 1000
        colour = tuple(int(c) for c in random.integers(40, 200, 3))
        draw.rectangle((left, top, left + step * 2 // 3, floor), fill=colour)
        draw.text((left, top - side // 16), str(value), fill="black", font=font)
        draw.text((left - step // 8, floor + side // 40 + i % 2 * side // 18), name, fill="black", font=font)
    draw.line((step // 3, floor, side - step // 3, floor), fill="black", width=2)
    return image


def questions(each=8, seed=0):
    """At most `each` questions of every kind: describe a photograph, read a page, read a chart's values."""
    asked = [Question(name, "photo", shot, "Describe this image in one sentence.") for name, shot in bundled_photographs()[:each]]
    asked += [Question(f"page {i + 1}", "text", page(seed + i), "Read the text in this image, line by line.") for i in range(each)]
    return asked + [Question(f"chart {i + 1}", "chart", chart(seed + i), "List every bar of this chart with its value.")
                    for i in range(each)]
