# The runtime of iteration-based runs of a few minutes: log often, keep the last checkpoint.
_base_ = './default_runtime.py'
default_hooks = dict(
    logger=dict(interval=25, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1),
)
log_processor = dict(window_size=25, by_epoch=False)
