//! Untrusted text, made safe for a terminal and for one line.

use std::borrow::Cow;

/// Returns whether a terminal shows a character as itself. Control characters are not printable, nor
/// are characters that reorder or hide text, such as bidirectional marks.
pub fn is_printable(character: char) -> bool {
    let is_invisible = matches!(
        character,
        '\u{ad}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
    );
    !character.is_control() && !is_invisible
}

/// Escapes the characters that are not printable, line breaks included, as a Rust string does.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if is_printable(character) {
            escaped.push(character);
        } else {
            escaped.extend(character.escape_default());
        }
    }
    Cow::Owned(escaped)
}

/// Returns the first characters of untrusted text for a message, without control characters.
pub fn excerpt(text: &str, maximum_characters: usize) -> String {
    text.chars().filter(|character| !character.is_control()).take(maximum_characters).collect()
}

/// Returns untrusted text for a message, without control characters. A text longer than
/// `maximum_bytes` ends in `…`, which does not count.
pub fn shorten(text: &str, maximum_bytes: usize) -> String {
    let mut kept = String::new();
    for character in text.chars().filter(|character| !character.is_control()) {
        if kept.len() + character.len_utf8() > maximum_bytes {
            kept.push('…');
            break;
        }
        kept.push(character);
    }
    kept
}

/// Returns the start of a text within `maximum_bytes`, cut between two characters.
pub fn truncated(text: &str, maximum_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(maximum_bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hold_a_bounded_part_on_one_line() {
        assert_eq!(excerpt("a\n\u{1b}größe", 4), "agrö");
        assert_eq!(excerpt("größe", 5), "größe");
        assert_eq!(shorten("a\ngrößer", 7), "agröß…");
        assert_eq!(shorten("größe", 7), "größe");
    }

    #[test]
    fn foreign_text_stays_on_its_line() {
        assert_eq!(printable("bin/größe"), "bin/größe");
        assert_eq!(printable("a\x1b[2J\nFAKE\u{9b}"), "a\\u{1b}[2J\\nFAKE\\u{9b}");
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
    }
}
