"""The data scripts turn what the world publishes into what metapt reads. None of them needs metapt.

Each is run as a module, from the repository or with its folder on PYTHONPATH:

    python -m data_scripts.mnist --help            MNIST
    python -m data_scripts.ptbxl --help            electrocardiograms: PTB-XL
    python -m data_scripts.hu_graphs --help        protein graphs: those that Hu et al. published
    python -m data_scripts.string_graphs --help    protein graphs: from files of STRING and GO
    python -m data_scripts.ud --help               tagged sentences: Universal Dependencies

`python metapt.py download mnist` (ecg, ppi, ppi string-yeast, ud) runs them from any folder.
What they share is in `files`, the layout of prepared graphs in `graphs`. They need numpy, requests,
rich and typer; `ptbxl` needs pandas and wfdb, too, and `hu_graphs` torch.
"""
