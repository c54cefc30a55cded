"""Install g3n, kernels and data_prep: the training framework for BrainG3N (arXiv 2606.19651)."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.10,<2.14",
    "deepspeed>=0.19.8,<0.20",
    "triton>=3.6,<3.10; platform_system=='Linux' and platform_machine=='x86_64'",
    "webdataset>=1.0.2,<2",
    "monai>=1.6,<1.7",
    "nibabel>=5.3,<6",
    "numpy>=2.1,<3",
    "scipy>=1.13,<2",
    "pandas>=2.2,<3",
    "scikit-learn>=1.5,<2",
    "matplotlib>=3.9,<4",
    "pyarrow>=17",  # features as Parquet; mlflow bounds it above
    "statsmodels>=0.14.4,<0.16",  # corrections for many tests
    "optuna>=4.2,<6",
    "mlflow>=3.10,<3.18",  # 3.18 makes pip backtrack through numpy releases
    "omegaconf>=2.3,<3",
    "requests>=2.31,<3",  # shards over HTTP
    "urllib3>=2,<3",
    "safetensors>=0.5,<1",
    "zstandard>=0.23,<1",
    "xxhash>=3.4,<4",
    "einops>=0.8,<1",
    "typer>=0.15,<1",
    "rich>=13.7,<16",
    "psutil>=5.9,<8",
]
EXTRAS = {
    # nilearn carries the ICBM152 templates of the phantom; antspyx registers; deepbet strips skulls.
    # openpyxl and xlrd read the cohorts' tables.
    "prep": [
        "nilearn>=0.12,<0.15",
        "antspyx>=0.6.3,<0.7",
        "deepbet>=1.0.2,<1.1",
        "openpyxl>=3.1,<4",
        "xlrd>=2.0.1,<3",
    ],
    "dicom": ["dcm2niix>=1.0.20250505"],
    "s3": ["s3fs>=2025.3,<2027"],
    "umap": ["umap-learn>=0.5.7,<0.6"],
    "xformers": ["xformers>=0.0.35,<0.1"],
    "dev": [
        "umap-learn>=0.5.7,<0.6",
        "pytest>=8.3,<10",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.100,<7",
        "ruff>=0.15,<0.18",
        "mypy>=1.15,<3",
        "pandas-stubs",
        "types-PyYAML",
        "pydicom>=3,<4",  # makes DICOM series for tests
        "s3fs>=2025.3,<2027",
        "moto[s3]>=5.1,<6",  # an S3 server for tests, with flask
        "flask>=3,<4",
        "flask-cors>=5,<7",
    ],
}

setup(
    name="g3n",
    version="0.1.0",
    description="Train and use BrainG3N: one embedding space for 3D brain MRI that serves probes and generation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["g3n", "g3n.*", "kernels", "kernels.*", "data_prep", "data_prep.*"]),
    package_data={"data_prep": ["qc_page.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["g3n = g3n.cli:main"]},
)
