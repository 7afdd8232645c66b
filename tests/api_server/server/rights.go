package main

import (
	"context"
	"slices"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/informers"
	listers "k8s.io/client-go/listers/rbac/v1"
)

// roles allows what RBAC does, but for aggregated roles; that authorizer is no library. Administrators may do all.
type roles struct {
	clusterRoles    listers.ClusterRoleLister
	clusterBindings listers.ClusterRoleBindingLister
	roles           listers.RoleLister
	bindings        listers.RoleBindingLister
}

func newRoles(factory informers.SharedInformerFactory) *roles {
	rbac := factory.Rbac().V1()
	return &roles{rbac.ClusterRoles().Lister(), rbac.ClusterRoleBindings().Lister(), rbac.Roles().Lister(), rbac.RoleBindings().Lister()}
}

func (r *roles) Authorize(_ context.Context, asked authorizer.Attributes) (authorizer.Decision, string, error) {
	// What is no resource says which kinds there are, and that the server lives.
	if slices.Contains(asked.GetUser().GetGroups(), user.SystemPrivilegedGroup) || !asked.IsResourceRequest() {
		return authorizer.DecisionAllow, "", nil
	}
	var granted []rbacv1.RoleRef
	clusterBindings, err := r.clusterBindings.List(labels.Everything())
	if err != nil {
		return authorizer.DecisionDeny, "", err
	}
	for _, binding := range clusterBindings {
		if isFor(binding.Subjects, asked.GetUser()) {
			granted = append(granted, binding.RoleRef)
		}
	}
	bindings, err := r.bindings.RoleBindings(asked.GetNamespace()).List(labels.Everything())
	if err != nil {
		return authorizer.DecisionDeny, "", err
	}
	for _, binding := range bindings {
		if asked.GetNamespace() != "" && isFor(binding.Subjects, asked.GetUser()) {
			granted = append(granted, binding.RoleRef)
		}
	}
	for _, reference := range granted {
		if slices.ContainsFunc(r.rules(reference, asked.GetNamespace()), func(rule rbacv1.PolicyRule) bool { return allows(rule, asked) }) {
			return authorizer.DecisionAllow, "", nil
		}
	}
	return authorizer.DecisionNoOpinion, "no role allows it", nil
}

func isFor(subjects []rbacv1.Subject, who user.Info) bool {
	return slices.ContainsFunc(subjects, func(subject rbacv1.Subject) bool {
		switch subject.Kind {
		case rbacv1.UserKind:
			return subject.Name == who.GetName()
		case rbacv1.GroupKind:
			return slices.Contains(who.GetGroups(), subject.Name)
		default:
			return who.GetName() == "system:serviceaccount:"+subject.Namespace+":"+subject.Name
		}
	})
}

func (r *roles) rules(reference rbacv1.RoleRef, namespace string) []rbacv1.PolicyRule {
	if reference.Kind == "Role" {
		if role, err := r.roles.Roles(namespace).Get(reference.Name); err == nil {
			return role.Rules
		}
	} else if role, err := r.clusterRoles.Get(reference.Name); err == nil {
		return role.Rules
	}
	return nil
}

func allows(rule rbacv1.PolicyRule, asked authorizer.Attributes) bool {
	resource := asked.GetResource()
	if asked.GetSubresource() != "" {
		resource += "/" + asked.GetSubresource()
	}
	has := func(list []string, wanted string) bool {
		return slices.Contains(list, "*") || slices.Contains(list, wanted)
	}
	named := len(rule.ResourceNames) == 0 || slices.Contains(rule.ResourceNames, asked.GetName())
	return named && has(rule.Verbs, asked.GetVerb()) && has(rule.APIGroups, asked.GetAPIGroup()) && has(rule.Resources, resource)
}
