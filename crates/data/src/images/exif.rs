//! The orientation in an EXIF block: tag 0x0112 of the first TIFF directory.

/// What the block begins with in JPEG, and in PNG files of some writers.
pub(super) const MARK: &[u8] = b"Exif\0\0";

/// The orientation, 1 to 8, that a TIFF file gives; `None` where it gives none.
pub(super) fn orientation(tiff: &[u8]) -> Option<u8> {
    let little = match tiff.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let pair = *tiff.get(at..)?.first_chunk::<2>()?;
        Some(if little { u16::from_le_bytes(pair) } else { u16::from_be_bytes(pair) })
    };
    let word = *tiff.get(4..)?.first_chunk::<4>()?;
    let directory = (if little { u32::from_le_bytes(word) } else { u32::from_be_bytes(word) }) as usize;
    let entries = short(directory)?;
    let entry = |index: u16| directory.checked_add(2 + usize::from(index) * 12);
    let found = (0..entries).filter_map(entry).find(|at| short(*at) == Some(0x0112))?;
    u8::try_from(short(found + 8)?).ok().filter(|orientation| (1..=8).contains(orientation))
}
