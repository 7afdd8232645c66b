//! Foreign text, made safe for a terminal and for a line of its own.

use std::borrow::Cow;

/// Returns whether a terminal shows a character as itself. Control characters are not printable, nor
/// are characters that reorder or hide text, such as bidirectional marks.
#[must_use]
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
#[must_use]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_stays_on_its_line() {
        assert_eq!(printable("bin/größe"), "bin/größe");
        assert_eq!(printable("a\x1b[2J\nFAKE\u{9b}"), "a\\u{1b}[2J\\nFAKE\\u{9b}");
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
    }
}
