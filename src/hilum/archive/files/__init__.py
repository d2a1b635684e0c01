"""Image files other than DICOM: `nifti`, `itk` (MetaImage, NRRD), `array` (NumPy), `image` (PNG, JPEG, TIFF)."""
