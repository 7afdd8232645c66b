//! Test vectors of the kubelet, and invalid secrets.

use std::collections::HashMap;

use base64::Engine as _;
use proptest::prelude::*;

use super::*;
use crate::{Reference, Repository};

const PASSWORD: &str = "hunter2-never-shown";

fn repository(text: &str) -> Repository {
    let reference: Reference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
    reference.repository().clone()
}

/// Returns a configuration whose entries have their index as user name.
fn config(keys: &[&str]) -> String {
    let entries = keys.iter().enumerate().map(|(number, key)| {
        let entry = serde_json::json!({"username": number.to_string(), "password": PASSWORD});
        ((*key).to_owned(), entry)
    });
    serde_json::json!({ "auths": entries.collect::<serde_json::Map<_, _>>() }).to_string()
}

fn usernames(credentials: Vec<Credential>) -> Vec<String> {
    let name = |credential| match credential {
        Credential::Basic { username, .. } | Credential::IdentityToken { username, .. } => username,
        Credential::Anonymous | Credential::RegistryToken { .. } => String::new(),
    };
    credentials.into_iter().map(name).collect()
}

fn matching(keys: &[&str], reference: &str) -> Vec<String> {
    let keyring = Keyring::from_docker_config(config(keys).as_bytes()).unwrap();
    usernames(keyring.matching(&repository(reference)))
}

fn fits(key: &str, reference: &str) -> bool {
    !matching(&[key], reference).is_empty()
}

fn secret(entries: &[(&str, &str)]) -> HashMap<String, String> {
    entries.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn basic(username: &str, password: &str) -> Credential {
    Credential::Basic { username: username.into(), password: password.into() }
}

fn only(auths: &str) -> Result<Vec<Credential>, SecretError> {
    let json = format!(r#"{{"auths": {{"r.io": {auths}}}}}"#);
    Keyring::from_docker_config(json.as_bytes())
        .map(|keyring| keyring.matching(&repository("r.io/app")))
}

#[test]
fn each_part_of_a_host_is_a_glob_of_its_own() {
    for key in [
        "prefix.kubernetes.io",
        "*.kubernetes.io",
        "prefix.*.io",
        "prefix.kubernetes.*",
        "pre*.kubernetes.io",
        "*.*.*",
        "p[a-z]efix.kubernetes.io",
        "p[qr]efix.kubernetes.io",
        "*fix.*net*.io",
    ] {
        assert!(fits(key, "prefix.kubernetes.io/app"), "{key}");
    }
    for key in [
        "*.io",
        "*",
        "kubernetes.io",
        "*.*.*.*",
        "*.prefix.kubernetes.io",
        "prefix.kubernetes.com",
        "k*.kubernetes.io",
        "prefi?.kubernetes.io",
        "p[^a-q]efix.kubernetes.io",
        r"prefix.kubernetes.\io",
        "prefix.kubernetes.io\n",
        "p[a-q]efix.kubernetes.io",
        "prefix.kubernetes.[i",
        "prefix.kubernetes.[]io",
        "**",
        "",
        "/",
        "https://",
    ] {
        assert!(!fits(key, "prefix.kubernetes.io/app"), "{key}");
    }
}

#[test]
fn ports_are_equal_as_texts() {
    assert!(fits("r.io:5000", "r.io:5000/app"));
    assert!(fits("*.io:5000", "r.io:5000/app"));
    assert!(!fits("r.io", "r.io:5000/app"));
    assert!(!fits("r.io:5000", "r.io/app"));
    assert!(!fits("r.io:443", "r.io/app"));
    assert!(!fits("r.io:*", "r.io:5000/app"));
    assert!(!fits("https://r.io:05000", "r.io:5000/app"));
}

#[test]
fn a_path_is_a_plain_prefix() {
    assert!(fits("r.io/team", "r.io/team/app"));
    assert!(fits("r.io/team", "r.io/team-b/app"));
    assert!(fits("r.io/team/", "r.io/team/app"));
    assert!(!fits("r.io/team/", "r.io/team-b/app"));
    assert!(!fits("r.io/team", "r.io/other/team"));
    assert!(!fits("r.io/t*", "r.io/team/app"));
    assert!(fits("r.io/team?x=1#y", "r.io/team/app"));
}

#[test]
fn schemes_and_api_versions_are_dropped() {
    for key in ["https://r.io", "http://r.io/", "r.io/v1/", "https://r.io/v2/", "https://u@r.io"] {
        assert!(fits(key, "r.io/app"), "{key}");
    }
    assert!(fits("https://r.io/v2/team", "r.io/team/app"));
    assert!(!fits("https://r.io/v1", "r.io/app"));
}

#[test]
fn similar_hosts_get_no_credentials() {
    for reference in [
        "r.io.evil.com/app",
        "evil-r.io/app",
        "r.io.evil.com:443/app",
        "xr.io/app",
        "r.iox/app",
        "evil.com/r.io/app",
        "r.io-evil.com/app",
        "sub.r.io/app",
    ] {
        for key in ["r.io", "https://r.io", "https://r.io/v1/", "r.io/app"] {
            assert!(!fits(key, reference), "{key} {reference}");
        }
    }
    assert!(!fits("r.io@evil.com", "r.io/app"));
    assert!(!fits("*.azurecr.io", "azurecr.io.evil.com/app"));
    assert!(!fits("*.azurecr.io", "a.b.azurecr.io/app"));
}

#[test]
fn longer_paths_come_before_shorter_ones_and_all_are_tried() {
    let keys = ["r.io", "r.io/team", "r.io/team/app", "*.io", "r.io/other", "quay.io"];
    assert_eq!(matching(&keys, "r.io/team/app"), ["2", "1", "0", "3"]);
    assert_eq!(matching(&keys, "r.io/x"), ["0", "3"]);
    assert_eq!(matching(&keys, "quay.io/x"), ["5", "3"]);
    assert!(matching(&keys, "k8s.gcr.example/x").is_empty());
}

#[test]
fn the_most_specific_keys_are_tried_and_no_others() {
    let path = "a".repeat(40);
    let keys: Vec<_> = (0..=path.len()).map(|length| format!("r.io/{}", &path[..length])).collect();
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    let expected: Vec<_> = (25..=40).rev().map(|number: u32| number.to_string()).collect();
    assert_eq!(matching(&keys, &format!("r.io/{path}/app")), expected);
}

#[test]
fn two_spellings_of_one_host_are_two_attempts_unless_equal() {
    assert_eq!(matching(&["https://r.io/v1/", "r.io"], "r.io/app"), ["0", "1"]);
    let json = format!(
        r#"{{"auths": {{"r.io": {{"auth": "{0}"}}, "https://r.io": {{"auth": "{0}"}}}}}}"#,
        base64::engine::general_purpose::STANDARD.encode("u:p")
    );
    let keyring = Keyring::from_docker_config(json.as_bytes()).unwrap();
    assert_eq!(keyring.matching(&repository("r.io/app")), [basic("u", "p")]);
}

#[test]
fn the_older_key_of_docker_hub_is_a_fallback() {
    for reference in ["busybox", "team/app", "docker.io/team/app", "index.docker.io/team/app"] {
        assert!(fits("https://index.docker.io/v1/", reference), "{reference}");
        assert!(fits("index.docker.io", reference), "{reference}");
        assert!(fits("docker.io", reference), "{reference}");
    }
    assert!(fits("docker.io/team", "team/app"));
    assert!(!fits("docker.io/team", "busybox"));
    assert!(!fits("https://index.docker.io/v1/", "r.io/app"));
    // The older key is used only if no other key matches.
    assert_eq!(matching(&["https://index.docker.io/v1/", "docker.io"], "busybox"), ["1"]);
}

#[test]
fn all_three_kinds_of_secrets_are_read() {
    let json = config(&["r.io"]);
    let older = r#"{"r.io": {"username": "0", "password": "p", "email": "e"}}"#;
    for entries in [
        secret(&[(".dockerconfigjson", &json)]),
        secret(&[(".dockercfg", older)]),
        secret(&[("username", "0"), ("password", "p")]),
    ] {
        let keyring = Keyring::from_secrets(&entries, "r.io").unwrap();
        assert_eq!(usernames(keyring.matching(&repository("r.io/app"))), ["0"]);
        assert!(keyring.matching(&repository("q.io/app")).is_empty());
        assert!(!keyring.is_empty());
    }
}

#[test]
fn a_bare_user_name_and_password_are_for_the_references_own_host() {
    let entries = secret(&[("username", "u"), ("password", PASSWORD)]);
    let of = |host: &str, reference: &str| {
        Keyring::from_secrets(&entries, host).unwrap().matching(&repository(reference)).len()
    };
    assert_eq!(of("r.io:5000", "r.io:5000/app"), 1);
    assert_eq!(of("r.io:5000", "r.io/app"), 0);
    assert_eq!(of("docker.io", "busybox"), 1);
    assert_eq!(of("index.docker.io", "busybox"), 1);
    // The host is never a glob here.
    assert_eq!(of("*.io", "r.io/app"), 0);
}

#[test]
fn keys_of_the_kubelet_are_ignored() {
    let tokens = ("csi.storage.k8s.io/serviceAccount.tokens", "{}");
    assert!(Keyring::from_secrets(&secret(&[tokens]), "r.io").unwrap().is_empty());
    assert!(Keyring::from_secrets(&secret(&[]), "r.io").unwrap().is_empty());
    let other = secret(&[tokens, ("token", PASSWORD)]);
    assert_eq!(Keyring::from_secrets(&other, "r.io").unwrap_err(), SecretError::NoKnownKey);
}

#[test]
fn a_missing_user_name_or_password_is_named() {
    let error = Keyring::from_secrets(&secret(&[("username", "u")]), "r.io").unwrap_err();
    assert_eq!(error, SecretError::HalfAPair { present: "username", missing: "password" });
    let error = Keyring::from_secrets(&secret(&[("password", "p")]), "r.io").unwrap_err();
    assert_eq!(error, SecretError::HalfAPair { present: "password", missing: "username" });
    let beside = secret(&[("username", "u"), (".dockerconfigjson", &config(&["r.io"]))]);
    assert!(Keyring::from_secrets(&beside, "r.io").is_ok());
}

#[test]
fn auth_takes_precedence_and_splits_at_the_first_colon() {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let auth = encode("robot$x:a:b");
    let entry = format!(r#"{{"auth": "{auth}", "username": "no", "password": "no"}}"#);
    assert_eq!(only(&entry).unwrap(), [basic("robot$x", "a:b")]);
    // Padded, unpadded and broken into lines.
    for auth in ["dTpw", "dTpwdw==", "dTpwdw", r"dTpw\ndw==\n"] {
        let found = only(&format!(r#"{{"auth": "{auth}"}}"#)).unwrap();
        assert_eq!(usernames(found), ["u"], "{auth}");
    }
    assert_eq!(
        only(r#"{"auth": "", "username": "u", "password": "p"}"#).unwrap(),
        [basic("u", "p")]
    );
}

#[test]
fn tokens_take_precedence_over_passwords() {
    let identity = only(r#"{"auth": "MDAwOg==", "identitytoken": "refresh"}"#).unwrap();
    assert_eq!(
        identity,
        [Credential::IdentityToken { username: "000".into(), token: "refresh".into() }]
    );
    let registry = only(r#"{"auth": "dTpw", "registrytoken": "ready"}"#).unwrap();
    assert_eq!(registry, [Credential::RegistryToken { token: "ready".into() }]);
}

#[test]
fn an_empty_entry_is_ignored() {
    assert_eq!(only("{}").unwrap(), []);
    assert_eq!(only(r#"{"auth": null, "username": null, "email": "x"}"#).unwrap(), []);
    for config in [r#"{"credsStore": "desktop"}"#, r#"{"auths": null}"#, "{}"] {
        assert!(Keyring::from_docker_config(config.as_bytes()).unwrap().is_empty());
    }
}

#[test]
fn errors_name_the_defect_and_quote_nothing() {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let no_colon = encode(PASSWORD);
    for content in [
        format!(r#"{{"auths": {{"r.io": {{"auth": "{no_colon}"}}}}}}"#),
        format!(r#"{{"auths": {{"r.io": {{"auth": "!{PASSWORD}"}}}}}}"#),
        format!(r#"{{"auths": {{"r.io": {{"auth": ["{PASSWORD}"]}}}}}}"#),
        format!(r#"{{"auths": {{"r.io": "{PASSWORD}"}}}}"#),
        format!(r#"{{"auths": "{PASSWORD}"}}"#),
        format!(r#"{{"auths": {{"r.io": {{"identitytoken": "{PASSWORD}\n"}}}}}}"#),
        format!(r#"{{"auths": {{"r.io": {{"registrytoken": "{PASSWORD} "}}}}}}"#),
        PASSWORD.to_owned(),
        format!(r#""{PASSWORD}""#),
        format!(r#"{{"auths": {{"r.io": {{"auth": "{PASSWORD}"#),
        "x".repeat(1024 * 1024 + 1),
        String::new(),
    ] {
        let entries = secret(&[(".dockerconfigjson", &content)]);
        let error = Keyring::from_secrets(&entries, "r.io").unwrap_err();
        for text in [error.to_string(), format!("{error:?}")] {
            assert!(text.contains(".dockerconfigjson"), "{text}");
            assert!(!text.contains(PASSWORD) && !text.contains(&no_colon), "{text}");
            assert!(text.len() < 500);
        }
    }
}

#[test]
fn credentials_are_never_shown() {
    let token = || PASSWORD.to_owned();
    for credential in [
        basic(PASSWORD, PASSWORD),
        Credential::IdentityToken { username: token(), token: token() },
        Credential::RegistryToken { token: token() },
    ] {
        assert!(!format!("{credential} {credential:?} {credential:#?}").contains(PASSWORD));
    }
    let keyring = Keyring::from_docker_config(config(&["r.io"]).as_bytes()).unwrap();
    assert!(!format!("{keyring:?}").contains(PASSWORD));
}

#[test]
fn distinct_credentials_have_distinct_material() {
    let all = [
        Credential::Anonymous,
        basic("", ""),
        basic("ab", "c"),
        basic("a", "bc"),
        Credential::IdentityToken { username: "ab".into(), token: "c".into() },
        Credential::RegistryToken { token: "ab".into() },
    ];
    for (left, one) in all.iter().enumerate() {
        for (right, other) in all.iter().enumerate() {
            assert_eq!(one.principal_material() == other.principal_material(), left == right);
        }
    }
}

proptest! {
    #[test]
    fn no_key_makes_the_keyring_panic(
        key in r"(?s)(https://)?([a-z*?\[\]^\\.:@/#-]{0,20}|.{0,20})",
        path in "[a-z]{1,10}(/[a-z]{1,10}){0,2}",
    ) {
        let _ = matching(&[&key], &format!("r.io:5000/{path}"));
    }

    #[test]
    fn no_content_makes_the_parser_panic(content in "(?s).{0,200}") {
        let _ = Keyring::from_docker_config(content.as_bytes());
        let _ = Keyring::from_secrets(&secret(&[(".dockercfg", &content)]), &content);
    }

    #[test]
    fn a_key_without_globs_fits_its_own_host_alone(
        host in "[a-c]{1,2}(\\.[a-c]{1,2}){1,2}",
        other in "[a-c]{1,2}(\\.[a-c]{1,2}){1,2}",
    ) {
        prop_assert_eq!(fits(&host, &format!("{other}/app")), host == other);
    }

    #[test]
    fn stars_agree_with_a_plain_search(pattern in "[ab*]{1,8}", text in "[ab]{1,8}") {
        fn search(pattern: &[u8], text: &[u8]) -> bool {
            match pattern.split_first() {
                None => text.is_empty(),
                Some((b'*', rest)) => (0..=text.len()).any(|skip| search(rest, &text[skip..])),
                Some((first, rest)) => text.first() == Some(first) && search(rest, &text[1..]),
            }
        }
        let expected = search(pattern.as_bytes(), text.as_bytes());
        prop_assert_eq!(fits(&format!("{pattern}.io"), &format!("{text}.io/app")), expected);
    }
}
