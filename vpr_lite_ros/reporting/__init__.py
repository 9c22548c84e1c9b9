"""From a recording to a verdict: does it work here, and with which parameters?

- `recorder.py` runs the network over every frame once and keeps what it said on disk,
  `recording.py` reads that;
- `truth.py` finds out which frames show the same place;
- `tuning.py` tries thresholds on what was kept;
- `figures.py` works out what a report says, `plots.py` and `gallery.py` draw it, `page.py` writes
  it down as one HTML file;
- `report.py` does all of that, one after the other.
"""
