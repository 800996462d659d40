"""The table of the sets. It imports nothing heavy: `fastdeit data make --help` and the parser read it."""

SETS = {
    "glyphs": "62 letters and digits, trained on in 200 typefaces, validated in 40 others, 14,880 pictures",
    "emoji": "emoji in 9 categories, trained on Google's drawings, validated on Twitter's, 3,781 pictures each",
    "cliparts": "clip art in 6 classes, 1,738 pictures of the public domain",
}
"""What `fastdeit data make NAME` can make, with a line about each. The set NAME is `SET` in the file `NAME.py` here."""
