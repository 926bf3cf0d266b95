# The runtime of iteration-based runs of a few minutes: log often, keep the last two
# checkpoints, because the oldest one is deleted before the next one is written.
_base_ = './default_runtime.py'
default_hooks = dict(
    logger=dict(interval=25, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=2),
)
log_processor = dict(window_size=25, by_epoch=False)
