//! The attributes `include` and `exclude`: which paths of an artifact a volume shows.
//!
//! Both are lists of globs, separated by commas (`\,` is a comma in a pattern), over
//! whole paths in the volume, case-sensitive. `*` and `?` stay within one name, `**`
//! crosses folders. A pattern that matches a folder selects all that is in it.
//! Spaces around a pattern, a leading `./` and a trailing `/` mean nothing. Without
//! `include` everything is included; what `exclude` matches is left out, whatever
//! includes it.

use std::collections::BTreeSet;

use globset::{Candidate, Glob, GlobBuilder, GlobMatcher, GlobSet, GlobSetBuilder};

use super::path::{RelativePath, Shown};

/// Patterns of one attribute: what one volume needs, and what compiles in milliseconds.
const PATTERNS: usize = 256;
/// Bytes of one pattern.
const PATTERN_BYTES: usize = 4096;

/// Which paths of an artifact a volume shows.
#[derive(Clone, Debug)]
pub struct Selection {
    include: Option<Patterns>,
    exclude: Patterns,
}

/// Why a text is not a list of patterns.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SelectionError {
    /// Not a glob.
    #[error(
        "the pattern \"{pattern}\" is not a glob ({reason}): put \\ before a character that is meant literally"
    )]
    Glob {
        /// The pattern, shown.
        pattern: String,
        /// What the parser says.
        reason: String,
    },
    /// A leading `/`.
    #[error(
        "the pattern \"{0}\" is absolute: write it relative to the volume, without the leading /"
    )]
    Absolute(String),
    /// A name `..`, which no path in a volume has.
    #[error("the pattern \"{0}\" contains \"..\", which no path in a volume does")]
    Parent(String),
    /// Beyond the bounds of this program.
    #[error(
        "there are more than {PATTERNS} patterns, or one of more than {PATTERN_BYTES} bytes: select folders instead of files"
    )]
    TooLong,
}

#[derive(Clone, Debug)]
struct Patterns {
    /// Sorted and without doubles.
    texts: Vec<String>,
    set: GlobSet,
    steps: Vec<Vec<Step>>,
}

/// What one name in a pattern asks of one name in a path.
#[derive(Clone, Debug)]
enum Step {
    /// To match.
    Name(GlobMatcher),
    /// It cannot be told by this name alone.
    Anything,
}

/// What the patterns say of one path, regardless of the folders above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) included: bool,
    pub(super) excluded: bool,
}

impl Default for Selection {
    /// Everything.
    fn default() -> Self {
        Self { include: None, exclude: Patterns::none() }
    }
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        self.canonical() == other.canonical()
    }
}

impl Eq for Selection {}

impl Selection {
    /// Reads the two attributes; a text without a pattern is an absent one.
    pub fn parse(include: &str, exclude: &str) -> Result<Self, SelectionError> {
        let include = Patterns::parse(include)?;
        let include = (!include.texts.is_empty()).then_some(include);
        Ok(Self { include, exclude: Patterns::parse(exclude)? })
    }

    /// Whether it selects everything.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.include.is_none() && self.exclude.texts.is_empty()
    }

    /// One text for all spellings and orders of the same patterns, for hashing. Each
    /// pattern is preceded by its length, so that no two lists share a text.
    #[must_use]
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

    /// The attributes that give this selection: `include` and `exclude`.
    #[must_use]
    pub fn attributes(&self) -> (String, String) {
        let join = |patterns: &Patterns| {
            patterns.texts.iter().map(|text| text.replace(',', "\\,")).collect::<Vec<_>>().join(",")
        };
        (self.include.as_ref().map(join).unwrap_or_default(), join(&self.exclude))
    }

    /// Whether a path is shown for its own sake. Folders above such a path are shown too.
    #[must_use]
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

    /// False only where no path at or below `folder` can be selected.
    #[must_use]
    pub fn may_select_below(&self, folder: &RelativePath) -> bool {
        let is_excluded =
            folder.ancestors().chain((!folder.is_root()).then(|| folder.clone())).any(|path| {
                self.exclude.set.is_match_candidate(&Candidate::from_bytes(path.as_bytes()))
            });
        !is_excluded && self.include.as_ref().is_none_or(|include| include.may_match_below(folder))
    }

    pub(super) fn matches(&self, path: &[u8]) -> Match {
        let candidate = Candidate::from_bytes(path);
        let matches = |patterns: &Patterns| patterns.set.is_match_candidate(&candidate);
        Match {
            included: self.include.as_ref().is_none_or(matches),
            excluded: matches(&self.exclude),
        }
    }
}

impl Patterns {
    fn none() -> Self {
        Self { texts: Vec::new(), set: GlobSet::empty(), steps: Vec::new() }
    }

    fn parse(list: &str) -> Result<Self, SelectionError> {
        let mut texts = BTreeSet::new();
        for pattern in split(list) {
            let pattern = normalised(pattern.trim())?;
            if !pattern.is_empty() {
                texts.insert(pattern);
            }
            if texts.len() > PATTERNS {
                return Err(SelectionError::TooLong);
            }
        }
        let mut set = GlobSetBuilder::new();
        let mut steps = Vec::new();
        for text in &texts {
            set.add(glob(text)?);
            steps.push(text.split('/').map(Step::of).collect());
        }
        let set = set.build().map_err(|error| SelectionError::Glob {
            pattern: Shown(list.as_bytes()).to_string(),
            reason: error.kind().to_string(),
        })?;
        Ok(Self { texts: texts.into_iter().collect(), set, steps })
    }

    /// Whether a pattern may match a path at or below a folder, or a folder above it.
    fn may_match_below(&self, folder: &RelativePath) -> bool {
        self.steps.iter().any(|steps| {
            // Where either ends first, the rest of the other may still match, or need not.
            for (step, name) in steps.iter().zip(folder.components()) {
                match step {
                    Step::Anything => return true,
                    Step::Name(glob) => {
                        if !glob.is_match_candidate(&Candidate::from_bytes(name)) {
                            return false;
                        }
                    }
                }
            }
            true
        })
    }
}

impl Step {
    fn of(name: &str) -> Self {
        // Classes and alternatives may hold a slash, so that what looks like one name is none.
        if name.contains("**") || name.contains(['[', ']', '{', '}', '\\']) {
            return Self::Anything;
        }
        glob(name).map_or(Self::Anything, |glob| Self::Name(glob.compile_matcher()))
    }
}

fn glob(pattern: &str) -> Result<Glob, SelectionError> {
    GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build().map_err(
        |error| SelectionError::Glob {
            pattern: Shown(pattern.as_bytes()).to_string(),
            reason: error.kind().to_string(),
        },
    )
}

/// Splits at commas; `\,` becomes a comma, and any other escape stays for the glob.
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
    if pattern.len() > PATTERN_BYTES {
        return Err(SelectionError::TooLong);
    }
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
    // The volume itself: all of it.
    if names.is_empty() && !pattern.is_empty() {
        return Ok("**".to_owned());
    }
    Ok(names.join("/"))
}

#[cfg(test)]
mod tests;
