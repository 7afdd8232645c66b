//! The attributes `include` and `exclude`: the paths of an artifact that a volume shows.
//!
//! Both are lists of globs, separated by commas (`\,` is a comma in a pattern), that match whole
//! paths in the volume, case-sensitively. `*` and `?` stay within one name, `**` crosses folders. A
//! pattern that matches a folder selects all of its content. Spaces around a pattern, a leading
//! `./` and a trailing `/` are ignored. Without `include`, everything is included. `exclude` takes
//! precedence over `include`.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use globset::{Candidate, Glob, GlobBuilder, GlobSet, GlobSetBuilder};

use super::volume_path::{RelativePath, Shown};

/// The maximum number of patterns in one attribute.
const PATTERNS: usize = 256;
/// The maximum length of all patterns of one attribute in bytes. It bounds the memory and the time
/// of their compilation: 20 ms on one core in November 2026.
const PATTERN_BYTES: usize = 16 << 10;
/// The maximum depth of nested alternatives. Parsing them recurses, and from 250 on they do not
/// compile.
const NESTED_ALTERNATIVES: usize = 32;
/// Memory of compiled patterns for each byte of text: the maximum measured in November 2026, with
/// names of `?`.
const COMPILED_BYTES: u64 = 600;

/// A selection of paths of an artifact.
///
/// Patterns are compiled when the first path is matched, and a clone is not compiled. Match paths
/// with a clone on a thread that may block, and drop it afterwards. So a pull holds only texts
/// while it waits.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    include: Option<GlobPatterns>,
    exclude: GlobPatterns,
}

/// Reason why a text is not a list of patterns.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SelectionError {
    /// A pattern that is not a glob.
    #[error(
        "the pattern \"{pattern}\" is not a glob ({reason}): put \\ before a character that is meant literally"
    )]
    Glob {
        /// Pattern, escaped for display.
        pattern: String,
        /// Reason of the parser.
        reason: String,
    },
    /// A pattern with a leading `/`.
    #[error(
        "the pattern \"{0}\" is absolute: write it relative to the volume, without the leading /"
    )]
    Absolute(String),
    /// A pattern with `..`, which no path in a volume has.
    #[error("the pattern \"{0}\" contains \"..\", which no path in a volume does")]
    Parent(String),
    /// More patterns or bytes than the limits.
    #[error(
        "there are more than {PATTERNS} patterns, or they have more than {PATTERN_BYTES} bytes in all: select folders instead of files"
    )]
    TooLong,
}

#[derive(Debug, Default)]
struct GlobPatterns {
    /// Texts of the patterns, sorted and without duplicates.
    texts: Vec<String>,
    compiled: OnceLock<GlobSet>,
}

/// Result of matching one path, regardless of the folders above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PatternMatch {
    pub(super) included: bool,
    pub(super) excluded: bool,
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        self.canonical() == other.canonical()
    }
}

impl Eq for Selection {}

impl Selection {
    /// Parses the two attributes. A text without a pattern counts as absent.
    pub fn parse(include: &str, exclude: &str) -> Result<Self, SelectionError> {
        let include = GlobPatterns::parse(include)?;
        let include = (!include.texts.is_empty()).then_some(include);
        Ok(Self { include, exclude: GlobPatterns::parse(exclude)? })
    }

    /// Returns whether everything is selected.
    pub fn is_everything(&self) -> bool {
        self.include.is_none() && self.exclude.texts.is_empty()
    }

    /// Returns one text for all spellings and orders of the same patterns, for hashing. Each
    /// pattern follows its length, so that no two lists share a text.
    pub fn canonical(&self) -> String {
        let mut text = String::new();
        let include = self.include.iter().flat_map(|patterns| &patterns.texts).map(|p| ('+', p));
        let exclude = self.exclude.texts.iter().map(|pattern| ('-', pattern));
        for (sign, pattern) in include.chain(exclude) {
            use std::fmt::Write as _;
            let _ = write!(text, "{sign}{}:{pattern}", pattern.len());
        }
        text
    }

    /// Returns the attributes `include` and `exclude` of this selection.
    pub fn attributes(&self) -> (String, String) {
        let join = |patterns: &GlobPatterns| {
            patterns.texts.iter().map(|text| text.replace(',', "\\,")).collect::<Vec<_>>().join(",")
        };
        (self.include.as_ref().map(join).unwrap_or_default(), join(&self.exclude))
    }

    /// Returns whether the path itself is selected. Folders above such a path are shown too.
    pub fn selects(&self, path: &RelativePath) -> bool {
        let mut included = self.include.is_none();
        for path in path.ancestors().chain(std::iter::once(path.clone())) {
            let found = self.matches(path.as_bytes());
            if found.excluded {
                return false;
            }
            included |= found.included;
        }
        included
    }

    /// Returns false only if no path at or below `folder` can be selected.
    pub fn may_select_below(&self, folder: &RelativePath) -> bool {
        let is_excluded = folder
            .ancestors()
            .chain((!folder.is_root()).then(|| folder.clone()))
            .any(|path| self.exclude.is_match(&Candidate::from_bytes(path.as_bytes())));
        !is_excluded && self.include.as_ref().is_none_or(|include| include.may_match_below(folder))
    }

    /// Returns the bytes of memory that the compiled patterns take at most.
    pub fn compiled_bytes(&self) -> u64 {
        let patterns = self.include.iter().chain([&self.exclude]);
        let bytes: usize = patterns.flat_map(|patterns| &patterns.texts).map(String::len).sum();
        (bytes as u64).saturating_mul(COMPILED_BYTES)
    }

    pub(super) fn matches(&self, path: &[u8]) -> PatternMatch {
        let candidate = Candidate::from_bytes(path);
        let matches = |patterns: &GlobPatterns| patterns.is_match(&candidate);
        PatternMatch {
            included: self.include.as_ref().is_none_or(matches),
            excluded: matches(&self.exclude),
        }
    }
}

impl Clone for GlobPatterns {
    fn clone(&self) -> Self {
        Self { texts: self.texts.clone(), compiled: OnceLock::new() }
    }
}

impl GlobPatterns {
    fn parse(list: &str) -> Result<Self, SelectionError> {
        let mut texts = BTreeSet::new();
        let mut bytes = 0;
        for pattern in split(list) {
            let pattern = normalised(pattern.trim())?;
            bytes += pattern.len();
            if !pattern.is_empty() {
                texts.insert(pattern);
            }
            if texts.len() > PATTERNS || bytes > PATTERN_BYTES {
                return Err(SelectionError::TooLong);
            }
        }
        for text in &texts {
            glob(text)?;
        }
        Ok(Self { texts: texts.into_iter().collect(), compiled: OnceLock::new() })
    }

    fn is_match(&self, path: &Candidate<'_>) -> bool {
        !self.texts.is_empty()
            && self.compiled.get_or_init(|| self.compile()).is_match_candidate(path)
    }

    fn compile(&self) -> GlobSet {
        let globs = self.texts.iter().map(|text| glob(text));
        let set = globs.collect::<Result<Vec<_>, _>>().and_then(|globs| {
            let set =
                globs.into_iter().fold(&mut GlobSetBuilder::new(), GlobSetBuilder::add).build();
            set.map_err(|error| refusal(&self.texts.join(","), &error))
        });
        // The compiler refuses four times as many bytes, and eight times as many levels, in
        // November 2026.
        set.expect("globs that were parsed compile within their bounds")
    }

    /// Returns whether a pattern may match a path at or below a folder, or a folder above it.
    fn may_match_below(&self, folder: &RelativePath) -> bool {
        self.texts.iter().any(|text| {
            // If one ends first, the rest of the other may still match or is not needed.
            for (pattern, name) in text.split('/').zip(folder.components()) {
                // Classes and alternatives may contain a slash, so that one component here may be
                // several names.
                if pattern.contains("**") || pattern.contains(['[', ']', '{', '}', '\\']) {
                    return true;
                }
                if !may_match_name(pattern.as_bytes(), name) {
                    return false;
                }
            }
            true
        })
    }
}

/// Compares a name with what is before the first and after the last wildcard of a pattern.
fn may_match_name(pattern: &[u8], name: &[u8]) -> bool {
    let is_wildcard = |byte: &u8| matches!(byte, b'*' | b'?');
    let Some(first) = pattern.iter().position(is_wildcard) else { return pattern == name };
    let last = pattern.iter().rposition(is_wildcard).unwrap_or(first);
    let (start, end) = (&pattern[..first], &pattern[last + 1..]);
    name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
}

fn glob(pattern: &str) -> Result<Glob, SelectionError> {
    if nested_alternatives(pattern) > NESTED_ALTERNATIVES {
        return Err(SelectionError::Glob {
            pattern: Shown(pattern.as_bytes()).to_string(),
            reason: format!("more than {NESTED_ALTERNATIVES} alternatives within each other"),
        });
    }
    let mut builder = GlobBuilder::new(pattern);
    let glob = builder.literal_separator(true).backslash_escape(true).build();
    glob.map_err(|error| refusal(pattern, &error))
}

/// Returns the depth of nested alternatives. A brace in a class counts too.
fn nested_alternatives(pattern: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => drop(characters.next()),
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

fn refusal(pattern: &str, error: &globset::Error) -> SelectionError {
    SelectionError::Glob {
        pattern: Shown(pattern.as_bytes()).to_string(),
        reason: error.kind().to_string(),
    }
}

/// Splits at commas. `\,` becomes a comma; other escapes are left to the glob.
fn split(list: &str) -> Vec<String> {
    let mut patterns = vec![String::new()];
    let mut characters = list.chars();
    while let Some(character) = characters.next() {
        let current = patterns.len() - 1;
        match character {
            ',' => patterns.push(String::new()),
            '\\' => match characters.next() {
                Some(',') => patterns[current].push(','),
                Some(escaped) => patterns[current].extend(['\\', escaped]),
                None => patterns[current].push('\\'),
            },
            other => patterns[current].push(other),
        }
    }
    patterns
}

fn normalised(pattern: &str) -> Result<String, SelectionError> {
    let shown = || Shown(pattern.as_bytes()).to_string();
    if pattern.starts_with('/') {
        return Err(SelectionError::Absolute(shown()));
    }
    let mut names = Vec::new();
    for name in pattern.split('/') {
        match name {
            "" | "." => {}
            ".." => return Err(SelectionError::Parent(shown())),
            name => names.push(name),
        }
    }
    // The root of the volume selects everything.
    if names.is_empty() && !pattern.is_empty() {
        return Ok("**".to_owned());
    }
    Ok(names.join("/"))
}

#[cfg(test)]
mod tests;
