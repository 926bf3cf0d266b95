# Hard: hard_relative.py with the paper's threshold for classifiers, which decide once per image.
_base_ = './hard_relative.py'
router = dict(constraint=dict(threshold=0.5))
