"""MMPretrain's CIFAR data sets, published or made from a folder of images for each class."""

from mmpretrain.datasets import CIFAR10 as PublishedCIFAR10
from mmpretrain.datasets import CIFAR100 as PublishedCIFAR100

from mmdet_moe.datasets.class_folders import checksums
from mmdet_moe.registry import DATASETS


class OwnChecksums:
    """Files with a note of ``tools/prepare_data.py --source`` are checked against that note."""

    @classmethod
    def expected_files(cls, folder: str) -> list[tuple[str, str | None]]:
        """Names and MD5 of the files that the data set reads.

        Args:
            folder: Where they are, of :attr:`base_folder`'s name.
        """
        meta = (cls.meta['filename'], cls.meta.get('md5'))
        noted = checksums(folder) or {}
        return [
            (name, noted.get(name, md5)) for name, md5 in (*cls.train_list, *cls.test_list, meta)
        ]

    def _check_integrity(self) -> bool:
        # What the base class compares; of this object, for another may read another folder.
        expected = dict(self.expected_files(f'{self.data_prefix["root"]}/{self.base_folder}'))
        for name in ('train_list', 'test_list'):
            setattr(self, name, [[file, expected[file]] for file, _ in getattr(self, name)])
        return super()._check_integrity()


@DATASETS.register_module()
class CIFAR10(OwnChecksums, PublishedCIFAR10):
    """MMPretrain's ``CIFAR10``, which also takes what was made of a folder of images.

    Args:
        **kwargs: As for MMPretrain's.
    """


@DATASETS.register_module()
class CIFAR100(OwnChecksums, PublishedCIFAR100):
    """MMPretrain's ``CIFAR100``, which also takes what was made of a folder of images.

    Args:
        **kwargs: As for MMPretrain's.
    """
