// An API server of Kubernetes' own libraries, for tests: ../README.md says what it has and what it lacks.
//
//	main      the server of custom resources, with storage, admission, and who may come in
//	builtins  the kinds of Kubernetes itself
//	rights    what roles allow
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net"
	"os"

	noop "go.opentelemetry.io/otel/trace/noop"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apiextensions-apiserver/pkg/cmd/server/options"
	custom "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/group"
	"k8s.io/apiserver/pkg/authentication/request/bearertoken"
	"k8s.io/apiserver/pkg/authentication/user"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kube-openapi/pkg/common"

	builtin "api_server/openapi"
)

var (
	etcd         = flag.String("etcd", "", "URL of etcd")
	port         = flag.Int("port", 0, "port on loopback")
	certificates = flag.String("certificates", "", "folder for the certificate, which is made")
)

func main() {
	flag.Parse()
	if err := run(genericapiserver.SetupSignalContext()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// who reads a token, which says itself whose it is: tests give out what kube-apiserver would have signed.
func who(_ context.Context, token string) (*authenticator.Response, bool, error) {
	text, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return nil, false, err
	}
	info := &user.DefaultInfo{}
	if err := json.Unmarshal(text, info); err != nil {
		return nil, false, err
	}
	return &authenticator.Response{User: info}, true, nil
}

func definitions(reference common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	all := builtin.GetOpenAPIDefinitions(reference)
	maps.Copy(all, custom.GetOpenAPIDefinitions(reference))
	return all
}

func storage(prefix string, codec runtime.Codec) *genericoptions.EtcdOptions {
	kept := genericoptions.NewEtcdOptions(storagebackend.NewDefaultConfig(prefix, codec))
	kept.StorageConfig.Transport.ServerList = []string{*etcd}
	return kept
}

func run(ctx context.Context) error {
	config := genericapiserver.NewRecommendedConfig(apiserver.Codecs)
	running := genericoptions.NewServerRunOptions()
	if err := running.Complete(); err != nil {
		return err
	}
	if err := running.ApplyTo(&config.Config); err != nil {
		return err
	}
	etcdOptions := storage("/registry/apiextensions.kubernetes.io", apiserver.Codecs.LegacyCodec(apiextensionsv1.SchemeGroupVersion))
	if err := etcdOptions.ApplyTo(&config.Config); err != nil {
		return err
	}
	loopback := net.IPv4(127, 0, 0, 1)
	serving := genericoptions.NewSecureServingOptions().WithLoopback()
	serving.BindAddress, serving.BindPort = loopback, *port
	serving.ServerCert.CertDirectory = *certificates
	if err := serving.MaybeDefaultWithSelfSignedCerts("localhost", nil, []net.IP{loopback}); err != nil {
		return err
	}
	if err := serving.ApplyToConfig(&config.Config); err != nil {
		return err
	}

	// Admission asks this server for policies and namespaces.
	config.ClientConfig = config.LoopbackClientConfig
	client, err := kubernetes.NewForConfig(config.LoopbackClientConfig)
	if err != nil {
		return err
	}
	dynamicClient, err := dynamic.NewForConfig(config.LoopbackClientConfig)
	if err != nil {
		return err
	}
	config.SharedInformerFactory = informers.NewSharedInformerFactory(client, 0)
	config.Authentication.Authenticator = group.NewAuthenticatedGroupAdder(bearertoken.New(authenticator.TokenFunc(who)))
	config.Authorization.Authorizer = newRoles(config.SharedInformerFactory)
	features := genericoptions.NewFeatureOptions()
	features.EnablePriorityAndFairness = false
	if err := features.ApplyTo(&config.Config, client, config.SharedInformerFactory); err != nil {
		return err
	}
	admission := genericoptions.NewAdmissionOptions()
	admission.DisablePlugins = []string{"MutatingAdmissionPolicy", "MutatingAdmissionWebhook", "ValidatingAdmissionWebhook"}
	if err := admission.ApplyTo(&config.Config, config.SharedInformerFactory, client, dynamicClient, utilfeature.DefaultFeatureGate, config.EffectiveVersion); err != nil {
		return err
	}
	if err := genericoptions.NewAPIEnablementOptions().ApplyTo(&config.Config, apiserver.DefaultAPIResourceConfigSource(), apiserver.Scheme); err != nil {
		return err
	}
	namer := openapinamer.NewDefinitionNamer(apiserver.Scheme, scheme)
	config.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(definitions, namer)
	config.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(definitions, namer)

	completed := (&apiserver.Config{
		GenericConfig: config,
		ExtraConfig: apiserver.ExtraConfig{
			CRDRESTOptionsGetter: options.NewCRDRESTOptionsGetter(*etcdOptions, config.ResourceTransformers, config.StorageObjectCountTracker),
			ServiceResolver:      webhook.NewDefaultServiceResolver(),
			AuthResolverWrapper:  webhook.NewDefaultAuthenticationInfoResolverWrapper(nil, nil, config.LoopbackClientConfig, noop.NewTracerProvider()),
			MasterCount:          1,
		},
	}).Complete()
	completed.GenericConfig.EnableDiscovery = true
	server, err := completed.New(genericapiserver.NewEmptyDelegate())
	if err != nil {
		return err
	}
	if err := installBuiltins(server.GenericAPIServer, config.StorageObjectCountTracker); err != nil {
		return err
	}
	return server.GenericAPIServer.PrepareRun().RunWithContext(ctx)
}
