"""Fine-tune in Azure OpenAI, and deploy the trained model as a step of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ft_core.errors import ArgumentError, TrainingError
from ft_core.extras import import_extra
from ft_core.openai_jobs.engine import OpenAIFinetuneEngine
from ft_core.retries import pause_before

if TYPE_CHECKING:
    import httpx
    import openai
    from llama_index.core.llms import LLM

MANAGEMENT_URL = "https://management.azure.com"
MANAGEMENT_API_VERSION = "2024-10-01"
"""Of Azure's management API (Microsoft.CognitiveServices), not of the OpenAI API."""

_API_VERSION = "2024-10-21"
_SECONDS_PER_REQUEST = 60.0
_PAUSES = (2.0, 30.0)  # seconds between two looks at a deployment
_TEMPORARY = (408, 409, 429, 500, 502, 503, 504)
_ENDED_BADLY = ("failed", "canceled", "cancelled", "deleting", "disabled")


class AzureOpenAIFinetuneEngine(OpenAIFinetuneEngine):
    """Train a hosted student in your own Azure OpenAI resource.

    Jobs are those of `OpenAIFinetuneEngine`. A trained model answers only once it is deployed,
    which costs by the hour: `deploy_finetuned_model` does it when you say so.

        engine.finetune()
        engine.deploy_finetuned_model(token, subscription, group, resource, "student")
        llm = engine.get_finetuned_model("student")

    Args:
        base_model, data_path, verbose, start_job_id, validate_json: as in the base class.
        azure_endpoint: `https://<resource>.openai.azure.com`; `AZURE_OPENAI_ENDPOINT` by
            default.
        api_version: of the OpenAI API; `OPENAI_API_VERSION` by default, or else 2024-10-21.
        settings: the keyword arguments of `OpenAIFinetuneEngine`; the default of `api_key` is
            `AZURE_OPENAI_API_KEY`, and `client` is an `openai.AzureOpenAI`, for example one
            that signs in with Entra ID.
    """

    def __init__(
        self,
        base_model: str,
        data_path: Any,
        verbose: bool = False,
        start_job_id: str | None = None,
        validate_json: bool = True,
        *,
        azure_endpoint: str | None = None,
        api_version: str | None = None,
        **settings: Any,
    ) -> None:
        if settings.get("base_url") is not None:
            raise ArgumentError("base_url", "is called azure_endpoint here")
        super().__init__(base_model, data_path, verbose, start_job_id, validate_json, **settings)
        self.azure_endpoint = azure_endpoint
        self.api_version = api_version

    def deploy_finetuned_model(
        self,
        token: str,
        subscription_id: str,
        resource_group: str,
        resource_name: str,
        model_deployment_name: str | None = None,
        *,
        sku: str = "Standard",
        capacity: int = 1,
        model_version: str = "1",
        management_url: str = MANAGEMENT_URL,
        management_api_version: str = MANAGEMENT_API_VERSION,
        wait: bool = True,
        timeout: float = 3600.0,
    ) -> dict[str, Any]:
        """Deploy the trained model; from then on it costs, used or not.

        Doing it twice changes the same deployment.

        Args:
            token: of Entra ID, as `az account get-access-token` prints it.
            subscription_id: of the Azure subscription.
            resource_group: that the Azure OpenAI resource is in.
            resource_name: of the Azure OpenAI resource.
            model_deployment_name: the name to call the model by; the trained model's by default.
            sku: `Standard`, `GlobalStandard`, `DeveloperTier` or another that the model has.
            capacity: in thousands of tokens a minute.
            model_version: of the trained model.
            management_url: of another Azure cloud.
            management_api_version: of Azure's management API.
            wait: False returns once Azure has taken the order.
            timeout: seconds to wait at most.

        Returns:
            The deployment as Azure describes it; its `name` is what
            `get_finetuned_model(engine=...)` takes.

        Raises:
            TrainingError: the job has not succeeded, Azure refuses, the deployment fails, or
                the time is over; with Azure's reason.
        """
        import httpx

        job = self._finished_job()
        url = _deployment_url(
            management_url,
            subscription_id,
            resource_group,
            resource_name,
            model_deployment_name or job.model or job.id,
        )
        body = {
            "sku": {"name": sku, "capacity": capacity},
            "properties": {
                "model": {"format": "OpenAI", "name": job.model, "version": model_version}
            },
        }
        with httpx.Client(
            params={"api-version": management_api_version},
            headers={"Authorization": f"Bearer {token}"},
            timeout=_SECONDS_PER_REQUEST,
        ) as client:
            # A PUT may be repeated: it names the deployment that there is to be.
            deployment = self._asked(client, "PUT", url, token, body)
            self._tell(f"deploying {job.model} as {url.rsplit('/', 1)[1]}")
            return self._deployed(client, url, token, deployment, timeout) if wait else deployment

    def get_finetuned_model(self, engine: str | None = None, **kwargs: Any) -> LLM:
        """Return the deployed model as LlamaIndex's `AzureOpenAI`.

        Args:
            engine: the name of the deployment; the trained model's by default, as for
                `deploy_finetuned_model`.
            kwargs: further arguments of the class, for example `temperature`; they win.

        Raises:
            TrainingError: the job has not succeeded; names its status.
            MissingExtraError: `llama-index-llms-azure-openai` is not installed.
        """
        module = import_extra("llama_index.llms.azure_openai", "llama-index-llms-azure-openai")
        job = self._finished_job()
        # The base model tells LlamaIndex the size of the context.
        base_model = self.base_model or getattr(job.raw, "model", "")
        settings = {"engine": engine or job.model, "model": base_model} | self._llm_settings()
        return module.AzureOpenAI(**(settings | kwargs))

    def _make_client(self) -> openai.OpenAI:
        import openai

        settings = self._llm_settings()
        if not settings["azure_endpoint"]:
            raise ArgumentError("azure_endpoint", "is missing; set AZURE_OPENAI_ENDPOINT")
        if not settings["api_key"]:
            raise ArgumentError(
                "api_key", "is missing; set AZURE_OPENAI_API_KEY, pass it, or pass a client"
            )
        return openai.AzureOpenAI(timeout=self.timeout, **settings)

    def _llm_settings(self) -> dict[str, Any]:
        if self._client is not None:
            # As the client was told: where it is and who it is, whatever the environment says.
            settings: dict[str, Any] = {
                "azure_endpoint": str(self._client.base_url.copy_with(raw_path=b"/")),
                "api_version": getattr(self._client, "_api_version", _API_VERSION),
            }
            provider = getattr(self._client, "_azure_ad_token_provider", None)
            if provider is not None:  # signed in with Entra ID: there is no key
                return settings | {"azure_ad_token_provider": provider, "use_azure_ad": True}
            return settings | {"api_key": self._client.api_key}
        return {
            "azure_endpoint": self.azure_endpoint or os.environ.get("AZURE_OPENAI_ENDPOINT"),
            "api_key": self._api_key or os.environ.get("AZURE_OPENAI_API_KEY"),
            "api_version": self.api_version or os.environ.get("OPENAI_API_VERSION", _API_VERSION),
        }

    def _method(self) -> dict[str, Any]:
        # Azure's older versions of the API know these only outside of `method`.
        if self.method == "supervised":
            return {"hyperparameters": self.hyperparameters} if self.hyperparameters else {}
        return super()._method()

    def _deployed(
        self,
        client: httpx.Client,
        url: str,
        token: str,
        deployment: dict[str, Any],
        timeout: float,
    ) -> dict[str, Any]:
        """Return the deployment once it is there."""
        deadline = time.monotonic() + timeout
        pause, longest = _PAUSES
        while (state := _state(deployment)).lower() != "succeeded":
            name = deployment.get("name") or url.rsplit("/", 1)[1]
            if state.lower() in _ENDED_BADLY:
                raise TrainingError(f"deployment {name} has the state {state}{_why(deployment)}")
            if time.monotonic() >= deadline:
                raise TrainingError(
                    f"deployment {name} is not ready after {timeout:g} s (state {state}). It goes "
                    "on; call deploy_finetuned_model again to wait for it"
                )
            self._sleep(pause)
            pause = min(pause * 1.5, longest)
            deployment = self._asked(client, "GET", url, token)
        return deployment

    def _asked(
        self, client: httpx.Client, method: str, url: str, token: str, body: Any = None
    ) -> dict[str, Any]:
        """Return the answer of Azure's management API, asking again where it is busy."""
        import httpx

        for attempt in range(self.max_retries + 1):
            last = attempt == self.max_retries
            try:
                response = client.request(method, url, json=body)
            except httpx.TransportError as error:
                if last:
                    host = httpx.URL(url).host
                    raise TrainingError(f"no answer by {host}: {error}") from error
                self._sleep(pause_before(None, attempt))
                continue
            if response.status_code in _TEMPORARY and not last:
                self._sleep(pause_before(response.headers, attempt))
                continue
            return _content(response, token)
        raise AssertionError("unreachable")


def _deployment_url(base: str, subscription: str, group: str, resource: str, name: str) -> str:
    parts = (quote(part, safe="") for part in (subscription, group, resource, name))
    subscription, group, resource, name = parts
    return (
        f"{base.rstrip('/')}/subscriptions/{subscription}/resourceGroups/{group}"
        f"/providers/Microsoft.CognitiveServices/accounts/{resource}/deployments/{name}"
    )


def _content(response: httpx.Response, token: str) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        content = {}
    content = content if isinstance(content, dict) else {}
    if response.is_success:
        return content
    error = content.get("error")
    error = error if isinstance(error, Mapping) else {}
    reason = error.get("message") or response.reason_phrase
    code = f" ({error['code']})" if error.get("code") else ""
    hint = ""
    if response.status_code == 401:
        hint = ". A token lives for about an hour; get one by: az account get-access-token"
    elif response.status_code == 403:
        hint = ". It takes the role Cognitive Services Contributor on the resource"
    raise TrainingError(
        f"Azure refuses the deployment ({response.status_code}): "
        f"{str(reason).replace(token, '***')}{code}{hint}"
    )


def _state(deployment: Mapping[str, Any]) -> str:
    properties = deployment.get("properties")
    state = properties.get("provisioningState") if isinstance(properties, Mapping) else None
    return str(state or "unknown")


def _why(deployment: Mapping[str, Any]) -> str:
    error = deployment.get("error") or deployment.get("properties", {}).get("error")
    message = error.get("message") if isinstance(error, Mapping) else None
    return f": {message}" if message else ""
