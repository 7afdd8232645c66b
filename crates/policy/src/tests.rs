use proptest::prelude::*;

use super::*;
use oci::signature::PublicKey;

const KEY: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
";

fn patterns(texts: &[&str]) -> Vec<Pattern> {
    texts.iter().map(|text| Pattern::parse(text).expect("a pattern")).collect()
}

fn rule(references: &[&str], namespaces: &[&str], action: Action) -> Rule {
    let (references, namespaces) = (patterns(references), patterns(namespaces));
    Rule { references, namespaces, action, demands: Demands::default() }
}

fn key() -> NamedKey {
    let key = PublicKey::from_pem(KEY.as_bytes()).expect("a key");
    NamedKey { name: "release".to_owned(), key }
}

fn decide(policy: &Policy, reference: &str, namespace: Option<&str>) -> Result<Demands, Refusal> {
    let reference = reference.parse().expect("a reference");
    policy.decide(Facts { reference: &reference, namespace, require_signature: false })
}

#[test]
fn the_first_rule_that_matches_counts() {
    let policy = Policy {
        rules: vec![
            rule(&["r.io/team/**"], &["team", "team-*"], Action::Allow),
            rule(&["r.io/team/**"], &[], Action::Deny),
            rule(&["docker.io/library/*", "r.io/*"], &[], Action::Allow),
        ],
        default: Action::Deny,
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
        let expected =
            rule.map_err(|rule| Refusal::Denied { rule, namespace: namespace.map(str::to_owned) });
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
        let rules = vec![rule(&[pattern], &[], Action::Deny)];
        let policy = Policy { rules, ..Policy::default() };
        for reference in references {
            let refused = decide(&policy, reference, None).map(drop);
            let denied = Refusal::Denied { rule: Some(1), namespace: None };
            assert_eq!(refused, Err(denied), "{reference} and {pattern}");
        }
        for other in ["r.io:5001/team/a", "r.io.evil/team/a", "localhost:443/team/a"] {
            assert!(decide(&policy, other, None).is_ok(), "{other} and {pattern}");
        }
    }
}

#[test]
fn a_demand_of_the_volume_adds_and_never_removes() {
    let facts =
        |reference, require_signature| Facts { reference, namespace: None, require_signature };
    let reference: Reference = "r.io/app:v1".parse().expect("a reference");
    let with = |keys: Vec<NamedKey>, signature| {
        let demands = Demands { signature, ..Demands::default() };
        let rule = Rule { demands, ..rule(&[], &[], Action::Allow) };
        Policy { rules: vec![rule], keys: keys.into(), ..Policy::default() }
    };
    assert_eq!(with(vec![], None).decide(facts(&reference, true)), Err(Refusal::NoKeys));
    let demands = with(vec![key()], None).decide(facts(&reference, true)).expect("allowed");
    assert_eq!(demands.signature.expect("a demand").keys.len(), 1);
    let warn = SignatureDemand {
        mode: SignatureMode::Warn,
        format: SignatureFormat::Legacy,
        keys: Arc::new([key()]),
    };
    let policy = with(vec![key()], Some(warn));
    for (asked, mode) in [(true, SignatureMode::Enforce), (false, SignatureMode::Warn)] {
        let demand = policy.decide(facts(&reference, asked)).expect("allowed").signature;
        let demand = demand.expect("a demand");
        assert_eq!((demand.mode, demand.format), (mode, SignatureFormat::Legacy));
    }
}

#[test]
fn a_digest_can_be_demanded() {
    let demands = Demands { digest: true, ..Demands::default() };
    let policy = Policy {
        rules: vec![Rule { demands, ..rule(&[], &[], Action::Allow) }],
        ..Policy::default()
    };
    let digest = format!("r.io/app@sha256:{}", "a".repeat(64));
    assert!(decide(&policy, &digest, None).is_ok());
    assert_eq!(decide(&policy, "r.io/app:v1", None), Err(Refusal::NoDigest { rule: Some(1) }));
}

#[test]
fn patterns_that_cannot_be_read_are_refused() {
    for text in ["", "r.io/[", "r.io/{a"] {
        assert!(Pattern::parse(text).is_err(), "{text}");
    }
}

proptest! {
    /// Whatever the rules are: what `requireSignature` adds is only ever a refusal or a demand.
    #[test]
    fn asking_for_a_signature_never_allows_more(
        rules in proptest::collection::vec((0..3_usize, 0..3_usize, any::<bool>(), any::<bool>()), 0..6),
        deny in any::<bool>(),
        keyed in any::<bool>(),
        (host, namespace) in (0..3_usize, 0..4_usize),
    ) {
        const REFERENCES: [&[&str]; 3] = [&[], &["a.io/**"], &["*/x", "b.io/*"]];
        const NAMESPACES: [&[&str]; 3] = [&[], &["one"], &["t*"]];
        let rules = rules.into_iter().map(|(references, namespaces, deny, digest)| Rule {
            demands: Demands { digest, ..Demands::default() },
            ..rule(
                REFERENCES[references],
                NAMESPACES[namespaces],
                if deny { Action::Deny } else { Action::Allow },
            )
        });
        let keys: Vec<_> = keyed.then(key).into_iter().collect();
        let default = if deny { Action::Deny } else { Action::Allow };
        let policy = Policy { rules: rules.collect(), default, keys: keys.into() };
        let reference: Reference = ["a.io/x", "b.io/y", "c.io/x/y"][host].parse().expect("a reference");
        let namespace = [None, Some("one"), Some("two"), Some("three")][namespace];
        let decide = |require_signature| {
            policy.decide(Facts { reference: &reference, namespace, require_signature })
        };
        match (decide(false), decide(true)) {
            (Err(without), Err(with)) => prop_assert_eq!(without, with),
            (Err(_), Ok(_)) => prop_assert!(false, "a demand opened what was refused"),
            (Ok(_), Err(with)) => prop_assert_eq!(with, Refusal::NoKeys),
            (Ok(without), Ok(with)) => {
                prop_assert!(with.signature.is_some());
                prop_assert_eq!(without, Demands { signature: None, ..with });
            }
        }
    }
}
