use proptest::prelude::*;

use super::*;
use oci::signature::{NamedKey, PublicKey, SignatureFormat};

const KEY: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
";

fn patterns(texts: &[&str]) -> Vec<GlobPattern> {
    texts.iter().map(|text| GlobPattern::parse(text).expect("a pattern")).collect()
}

fn rule(references: &[&str], namespaces: &[&str], action: PolicyAction) -> PolicyRule {
    let (references, namespaces) = (patterns(references), patterns(namespaces));
    PolicyRule { references, namespaces, action, demands: PolicyDemands::default() }
}

fn key() -> NamedKey {
    let key = PublicKey::from_pem(KEY.as_bytes()).expect("a key");
    NamedKey { name: "release".to_owned(), key }
}

fn signers(keys: Vec<NamedKey>) -> Signers {
    Signers { keys: keys.into(), ..Signers::default() }
}

fn decide(
    policy: &Policy,
    reference: &str,
    namespace: Option<&str>,
) -> Result<PolicyDemands, PolicyError> {
    let reference = reference.parse().expect("a reference");
    policy.decide(PolicyRequest { reference: &reference, namespace, require_signature: false })
}

#[test]
fn the_first_rule_that_matches_counts() {
    let policy = Policy {
        rules: vec![
            rule(&["r.io/team/**"], &["team", "team-*"], PolicyAction::Allow),
            rule(&["r.io/team/**"], &[], PolicyAction::Deny),
            rule(&["docker.io/library/*", "r.io/*"], &[], PolicyAction::Allow),
        ],
        default: PolicyAction::Deny,
        ..Policy::default()
    };
    for (reference, namespace, rule) in [
        ("r.io/team/app", Some("team"), Ok(())),
        ("r.io/team/a/b", Some("team-two"), Ok(())),
        ("r.io/team/app", Some("other"), Err(Some(2))),
        ("r.io/team/app", None, Err(Some(2))),
        ("r.io/app", Some("other"), Ok(())),
        ("r.io/deep/app", Some("other"), Err(None)),
        ("busybox", Some("other"), Ok(())),
        ("r.io.evil/team/app", Some("team"), Err(None)),
    ] {
        let expected = rule
            .map_err(|rule| PolicyError::Denied { rule, namespace: namespace.map(str::to_owned) });
        assert_eq!(decide(&policy, reference, namespace).map(drop), expected, "{reference}");
    }
}

#[test]
fn another_spelling_of_a_registry_meets_the_same_rule() {
    for (pattern, references) in [
        (
            "r.io/team/**",
            &["r.io/team/a", "R.Io/team/a", "r.io:443/team/a", "r.io:0443/team/a"][..],
        ),
        ("R.io:443/team/**", &["r.io/team/a", "r.io:443/team/a"]),
        ("r.io:5000/**", &["r.io:5000/a", "R.IO:05000/a"]),
        ("docker.io/library/**", &["busybox", "registry-1.docker.io/library/a"]),
    ] {
        let rules = vec![rule(&[pattern], &[], PolicyAction::Deny)];
        let policy = Policy { rules, ..Policy::default() };
        for reference in references {
            let refused = decide(&policy, reference, None).map(drop);
            let denied = PolicyError::Denied { rule: Some(1), namespace: None };
            assert_eq!(refused, Err(denied), "{reference} and {pattern}");
        }
        for other in ["r.io:5001/team/a", "r.io.evil/team/a", "localhost:443/team/a"] {
            assert!(decide(&policy, other, None).is_ok(), "{other} and {pattern}");
        }
    }
}

#[test]
fn a_demand_of_the_volume_adds_and_never_removes() {
    let request = |reference, require_signature| PolicyRequest {
        reference,
        namespace: None,
        require_signature,
    };
    let reference: Reference = "r.io/app:v1".parse().expect("a reference");
    let with = |keys: Vec<NamedKey>, signature| {
        let demands = PolicyDemands { signature, ..PolicyDemands::default() };
        let rule = PolicyRule { demands, ..rule(&[], &[], PolicyAction::Allow) };
        Policy { rules: vec![rule], signers: signers(keys), ..Policy::default() }
    };
    assert_eq!(with(vec![], None).decide(request(&reference, true)), Err(PolicyError::NoKeys));
    let demands = with(vec![key()], None).decide(request(&reference, true)).expect("allowed");
    assert_eq!(demands.signature, Some(SignatureDemand::signed_by(signers(vec![key()]))));
    let warn = SignatureDemand {
        mode: SignatureMode::Warn,
        format: SignatureFormat::Legacy,
        ..SignatureDemand::signed_by(signers(vec![key()]))
    };
    let policy = with(vec![key()], Some(warn));
    for (asked, mode) in [(true, SignatureMode::Enforce), (false, SignatureMode::Warn)] {
        let demand = policy.decide(request(&reference, asked)).expect("allowed").signature;
        let demand = demand.expect("a demand");
        assert_eq!((demand.mode, demand.format), (mode, SignatureFormat::Legacy));
    }
}

#[test]
fn a_rule_can_demand_a_digest() {
    let demands = PolicyDemands { digest: true, ..PolicyDemands::default() };
    let policy = Policy {
        rules: vec![PolicyRule { demands, ..rule(&[], &[], PolicyAction::Allow) }],
        ..Policy::default()
    };
    let digest = format!("r.io/app@sha256:{}", "a".repeat(64));
    assert!(decide(&policy, &digest, None).is_ok());
    assert_eq!(decide(&policy, "r.io/app:v1", None), Err(PolicyError::NoDigest { rule: Some(1) }));
}

#[test]
fn malformed_patterns_are_refused() {
    let nested = |depth| format!("r.io/{}a{}", "{".repeat(depth), "}".repeat(depth));
    let long = "a".repeat(MAXIMUM_PATTERN_BYTES + 1);
    for text in ["", "r.io/[", "r.io/{a", &nested(MAXIMUM_NESTED + 1), &long] {
        assert!(GlobPattern::parse(text).is_err(), "{}", excerpt(text, 20));
    }
    assert!(GlobPattern::parse(&nested(MAXIMUM_NESTED)).is_ok());
    let hosts: Vec<_> = (0..1000).map(|number| format!("host-{number}.example/**")).collect();
    assert!(GlobPattern::parse(&format!("{{{}}}", hosts.join(","))).is_ok());
}

#[test]
fn patterns_that_match_no_repository_are_refused() {
    for text in [
        "https://r.io/**",
        "r.io/app:v1",
        "r.io/app@sha256:*",
        "/r.io/**",
        " r.io/**",
        "r.io/app ",
        "r.io/",
        "r.io",
        "*",
    ] {
        let error = GlobPattern::of_repositories(text).expect_err(text);
        assert!(error.contains("registry/**"), "{error}");
    }
    for text in ["**", "r.io:5000/**", "*/app", "**/app", "{r.io/a,r.io/b}", "r.io/*"] {
        assert!(GlobPattern::of_repositories(text).is_ok(), "{text}");
    }
}

proptest! {
    /// Whatever the rules are, `requireSignature` only ever adds a refusal or a demand.
    #[test]
    fn asking_for_a_signature_never_allows_more(
        rules in proptest::collection::vec((0..3_usize, 0..3_usize, any::<bool>(), any::<bool>()), 0..6),
        deny in any::<bool>(),
        keyed in any::<bool>(),
        (host, namespace) in (0..3_usize, 0..4_usize),
    ) {
        const REFERENCES: [&[&str]; 3] = [&[], &["a.io/**"], &["*/x", "b.io/*"]];
        const NAMESPACES: [&[&str]; 3] = [&[], &["one"], &["t*"]];
        let rules = rules.into_iter().map(|(references, namespaces, deny, digest)| PolicyRule {
            demands: PolicyDemands { digest, ..PolicyDemands::default() },
            ..rule(
                REFERENCES[references],
                NAMESPACES[namespaces],
                if deny { PolicyAction::Deny } else { PolicyAction::Allow },
            )
        });
        let keys: Vec<_> = keyed.then(key).into_iter().collect();
        let default = if deny { PolicyAction::Deny } else { PolicyAction::Allow };
        let policy = Policy { rules: rules.collect(), default, signers: signers(keys) };
        let reference: Reference = ["a.io/x", "b.io/y", "c.io/x/y"][host].parse().expect("a reference");
        let namespace = [None, Some("one"), Some("two"), Some("three")][namespace];
        let decide = |require_signature| {
            policy.decide(PolicyRequest { reference: &reference, namespace, require_signature })
        };
        match (decide(false), decide(true)) {
            (Err(without), Err(with)) => prop_assert_eq!(without, with),
            (Err(_), Ok(_)) => prop_assert!(false, "a demand opened what was refused"),
            (Ok(_), Err(with)) => prop_assert_eq!(with, PolicyError::NoKeys),
            (Ok(without), Ok(with)) => {
                prop_assert!(with.signature.is_some());
                prop_assert_eq!(without, PolicyDemands { signature: None, ..with });
            }
        }
    }
}
