package main

import (
	"context"
	"fmt"
	"reflect"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/registry/generic"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	apistorage "k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/names"
	flowcontrol "k8s.io/apiserver/pkg/util/flowcontrol/request"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/ptr"
)

// What scripts/test-api-server makes OpenAPI of.
var groups = []schema.GroupVersion{
	corev1.SchemeGroupVersion, appsv1.SchemeGroupVersion, batchv1.SchemeGroupVersion, coordinationv1.SchemeGroupVersion,
	storagev1.SchemeGroupVersion, rbacv1.SchemeGroupVersion, admissionv1.SchemeGroupVersion, policyv1.SchemeGroupVersion,
	networkingv1.SchemeGroupVersion, schedulingv1.SchemeGroupVersion,
}

// Kinds that are in no namespace; the types do not say it.
var clusterWide = sets.New(
	"Namespace", "Node", "PersistentVolume", "ComponentStatus", "CSIDriver", "CSINode", "StorageClass", "VolumeAttachment",
	"VolumeAttributesClass", "ClusterRole", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
	"MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding", "ValidatingWebhookConfiguration",
	"MutatingWebhookConfiguration", "PriorityClass", "IngressClass", "IPAddress", "ServiceCIDR",
)

var (
	scheme = runtime.NewScheme()
	codecs = serializer.NewCodecFactory(scheme)
)

func init() {
	utilruntime.Must(clientscheme.AddToScheme(scheme))
	unversioned := schema.GroupVersion{Version: "v1"}
	metav1.AddToGroupVersion(scheme, unversioned)
	scheme.AddUnversionedTypes(unversioned, &metav1.Status{}, &metav1.APIVersions{}, &metav1.APIGroupList{}, &metav1.APIGroup{}, &metav1.APIResourceList{})
	for _, version := range groups {
		// What is sent is kept: there are no other types inside.
		internal := schema.GroupVersion{Group: version.Group, Version: runtime.APIVersionInternal}
		for kind, list := range kinds(version) {
			scheme.AddKnownTypeWithName(internal.WithKind(kind), made(scheme.KnownTypes(version)[kind]))
			scheme.AddKnownTypeWithName(internal.WithKind(kind+"List"), made(list))
		}
		utilruntime.Must(scheme.SetVersionPriority(version))
	}
}

// kinds has the objects that can be listed, with the type of the list.
func kinds(version schema.GroupVersion) map[string]reflect.Type {
	types, found := scheme.KnownTypes(version), map[string]reflect.Type{}
	for kind, object := range types {
		_, kept := made(object).(metav1.Object)
		if list, ok := types[kind+"List"]; ok && kept {
			found[kind] = list
		}
	}
	return found
}

func made(kind reflect.Type) runtime.Object { return reflect.New(kind).Interface().(runtime.Object) }

// strategy lets pass what can be decoded.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
	namespaced bool
}

func (s strategy) NamespaceScoped() bool                                      { return s.namespaced }
func (strategy) AllowCreateOnUpdate() bool                                    { return false }
func (strategy) AllowUnconditionalUpdate() bool                               { return true }
func (strategy) Canonicalize(runtime.Object)                                  {}
func (strategy) PrepareForCreate(_ context.Context, object runtime.Object)    { setDefaults(object) }
func (strategy) PrepareForUpdate(_ context.Context, object, _ runtime.Object) { setDefaults(object) }
func (strategy) Validate(context.Context, runtime.Object) field.ErrorList     { return nil }
func (strategy) WarningsOnCreate(context.Context, runtime.Object) []string    { return nil }
func (strategy) ValidateUpdate(context.Context, runtime.Object, runtime.Object) field.ErrorList {
	return nil
}
func (strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}

// setDefaults is for policies, which match nothing without.
func setDefaults(object runtime.Object) {
	var match *admissionv1.MatchResources
	switch it := object.(type) {
	case *admissionv1.ValidatingAdmissionPolicy:
		match = it.Spec.MatchConstraints
	case *admissionv1.ValidatingAdmissionPolicyBinding:
		match = it.Spec.MatchResources
	}
	if match == nil {
		return
	}
	if match.MatchPolicy == nil {
		match.MatchPolicy = ptr.To(admissionv1.Equivalent)
	}
	if match.NamespaceSelector == nil {
		match.NamespaceSelector = &metav1.LabelSelector{}
	}
	if match.ObjectSelector == nil {
		match.ObjectSelector = &metav1.LabelSelector{}
	}
	for i := range match.ResourceRules {
		if match.ResourceRules[i].Scope == nil {
			match.ResourceRules[i].Scope = ptr.To(admissionv1.AllScopes)
		}
	}
}

func attributes(object runtime.Object) (labels.Set, fields.Set, error) {
	accessor, err := meta.Accessor(object)
	if err != nil {
		return nil, nil, err
	}
	return accessor.GetLabels(), fields.Set{"metadata.name": accessor.GetName(), "metadata.namespace": accessor.GetNamespace()}, nil
}

func predicate(label labels.Selector, field fields.Selector) apistorage.SelectionPredicate {
	return apistorage.SelectionPredicate{Label: label, Field: field, GetAttrs: attributes}
}

func installBuiltins(server *genericapiserver.GenericAPIServer, tracker flowcontrol.StorageObjectCountTracker) error {
	for _, version := range groups {
		kept := storage("/registry", codecs.LegacyCodec(version))
		kept.StorageConfig.StorageObjectCountTracker = tracker
		getter := kept.CreateRESTOptionsGetter(&genericoptions.SimpleStorageFactory{StorageConfig: kept.StorageConfig}, nil)
		stores := map[string]rest.Storage{}
		for kind, list := range kinds(version) {
			object := scheme.KnownTypes(version)[kind]
			plural, singular := meta.UnsafeGuessKindToResource(version.WithKind(kind))
			plan := strategy{scheme, names.SimpleNameGenerator, !clusterWide.Has(kind)}
			store := &genericregistry.Store{
				NewFunc:                   func() runtime.Object { return made(object) },
				NewListFunc:               func() runtime.Object { return made(list) },
				PredicateFunc:             predicate,
				DefaultQualifiedResource:  plural.GroupResource(),
				SingularQualifiedResource: singular.GroupResource(),
				CreateStrategy:            plan,
				UpdateStrategy:            plan,
				DeleteStrategy:            plan,
				TableConvertor:            rest.NewDefaultTableConvertor(plural.GroupResource()),
			}
			if err := store.CompleteWithOptions(&generic.StoreOptions{RESTOptions: getter, AttrFunc: attributes}); err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			stores[plural.Resource] = store
		}
		info := genericapiserver.NewDefaultAPIGroupInfo(version.Group, scheme, runtime.NewParameterCodec(scheme), codecs)
		info.PrioritizedVersions = []schema.GroupVersion{version}
		info.VersionedResourcesStorageMap[version.Version] = stores
		install := server.InstallAPIGroup
		if version.Group == "" {
			install = func(info *genericapiserver.APIGroupInfo) error { return server.InstallLegacyAPIGroup("/api", info) }
		}
		if err := install(&info); err != nil {
			return err
		}
	}
	return nil
}
