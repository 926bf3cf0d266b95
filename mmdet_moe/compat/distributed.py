"""Several processes on a machine without a GPU.

MMEngine's own set-up of a process group selects a CUDA device first and fails there. It keeps a
group that exists already, so the tools start one on ``gloo`` before they build the Runner.
"""

import datetime
import os
import subprocess

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device

from mmdet_moe.errors import ConfigError

_DEFAULT_PORT = '29500'
_PROCESS_VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
# What the launchers call the variables of `_PROCESS_VARIABLES`.
_LAUNCHER_VARIABLES = {
    'pytorch': _PROCESS_VARIABLES,
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_LAUNCH_COMMANDS = {
    'pytorch': 'tools/dist_train.sh or torchrun',
    'slurm': 'tools/slurm_train.sh or srun',
    'mpi': 'mpirun',
}


def _first_number(index: int) -> int:
    for variables in _LAUNCHER_VARIABLES.values():
        if variables[index] in os.environ:
            return int(os.environ[variables[index]])
    return 0


def global_rank() -> int:
    """Number of this process among all, 0 without a launcher; works before there is a group."""
    return _first_number(_PROCESS_VARIABLES.index('RANK'))


def local_rank() -> int:
    """Number of this process on its machine, 0 without a launcher."""
    return _first_number(_PROCESS_VARIABLES.index('LOCAL_RANK'))


def note(sentence: str) -> None:
    """Print what a user has to know, once among all processes."""
    if global_rank() == 0:
        print(f'note: {sentence}', flush=True)


def check_launcher(launcher: str) -> None:
    """Complain about ``--launcher`` without the launcher.

    Raises:
        ConfigError: the launcher's environment variables are not set.
    """
    if launcher == 'none':
        return
    missing = [name for name in _LAUNCHER_VARIABLES[launcher] if name not in os.environ]
    if missing:
        raise ConfigError(
            f'--launcher {launcher} needs the environment variable {missing[0]}: start the command '
            f'with {_LAUNCH_COMMANDS[launcher]}, or leave --launcher out'
        )


def _first_slurm_host() -> str:
    nodes = os.environ.get('SLURM_NODELIST', '')
    command = ['scontrol', 'show', 'hostnames', nodes]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            'set the environment variable MASTER_ADDR: `scontrol` does not say which machine is '
            f'the first of SLURM_NODELIST={nodes!r}'
        ) from error
    return listing.split()[0]


def _set_address(launcher: str) -> None:
    os.environ.setdefault('MASTER_PORT', _DEFAULT_PORT)
    if 'MASTER_ADDR' in os.environ:
        return
    if launcher != 'slurm':
        raise ConfigError(f'--launcher {launcher} needs the environment variable MASTER_ADDR')
    os.environ['MASTER_ADDR'] = _first_slurm_host()


def init_cpu_group(cfg: Config) -> bool:
    """Start a ``gloo`` group and adapt ``cfg`` to it where ``cfg.launcher`` runs without a GPU.

    Args:
        cfg: with a ``model_wrapper_cfg``, which is changed in place.

    Returns:
        Whether a group was started; with an accelerator that is left to MMEngine.

    Raises:
        ConfigError: the launcher's environment variables are not set.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return False
    check_launcher(launcher)
    for variable, source in zip(_PROCESS_VARIABLES, _LAUNCHER_VARIABLES[launcher], strict=True):
        os.environ[variable] = os.environ[source]
    _set_address(launcher)
    # DistributedDataParallel takes none for a module on the CPU.
    cfg.model_wrapper_cfg.device_ids = None
    if not dist.is_initialized():
        dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
        timeout = datetime.timedelta(seconds=dist_cfg.get('timeout', 1800))
        dist.init_process_group(backend='gloo', timeout=timeout)
    return True
