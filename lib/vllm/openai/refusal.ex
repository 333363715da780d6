defmodule VLLM.OpenAI.Refusal do
  @moduledoc false
  # Errors as clients of OpenAI's API know them. What a client cannot do anything
  # about is told in general: a message for those who run the engine may have
  # paths and lines of a log in it.

  alias VLLM.{Error, JSON}

  @enforce_keys [:status, :code, :message]
  defstruct [:status, :code, :message, headers: []]

  @type t :: %__MODULE__{
          status: 400..599,
          code: String.t(),
          message: String.t(),
          headers: [{String.t(), String.t()}]
        }

  @statuses %{
    invalid_option: 400,
    invalid_prompt: 400,
    prompt_too_long: 400,
    unsupported: 400,
    model_not_found: 404,
    overloaded: 429,
    queue_timeout: 503,
    timeout: 504,
    engine_dead: 503,
    load_failed: 503,
    load_timeout: 503,
    out_of_memory: 503,
    failed: 503,
    not_running: 503,
    shutdown: 503,
    aborted: 503
  }

  # What is the client's affair.
  @told [:invalid_option, :invalid_prompt, :prompt_too_long, :unsupported, :model_not_found]

  @general %{
    overloaded:
      "Too many requests are under way. Try again after the time that `Retry-After` says.",
    queue_timeout:
      "The engine had too much to do to begin with the request in time. Try again later.",
    timeout:
      "The request was not done in the time that it may take. Ask for less, or try again later.",
    poison:
      "The engine ended with this request under way, and again when it was tried once more. Change the " <>
        "request.",
    aborted: "The request was cancelled. Try again later."
  }

  @doc "An error of this library's."
  @spec of_error(Error.t()) :: t()
  def of_error(%Error{reason: reason} = error) do
    refusal = new(Map.get(@statuses, reason, 500), Atom.to_string(reason), message(error))

    if refusal.status in [429, 503],
      do: later(refusal, error.details["retry_after_ms"]),
      else: refusal
  end

  defp message(%Error{reason: reason, message: message}) when reason in @told, do: message

  defp message(%Error{reason: reason}) do
    Map.get(@general, reason) ||
      if(Map.get(@statuses, reason) == 503,
        do: "The engine is not there at the moment. Try again later.",
        else: "The server has a fault. Its operators can see more in its log."
      )
  end

  # In whole seconds, of which there is one at least.
  defp later(refusal, milliseconds) do
    seconds = max(1, div((milliseconds || 1000) + 999, 1000))
    %{refusal | headers: [{"retry-after", Integer.to_string(seconds)}]}
  end

  @spec no_key() :: t()
  def no_key do
    refusal =
      new(401, "invalid_api_key", "No API key, or a wrong one: `Authorization: Bearer KEY`.")

    %{refusal | headers: [{"www-authenticate", "Bearer"}]}
  end

  @spec no_path() :: t()
  def no_path, do: new(404, "not_found", "There is nothing at this path.")

  @spec no_method(String.t()) :: t()
  def no_method(allowed) do
    refusal = new(405, "method_not_allowed", "This path takes #{allowed} and no other method.")
    %{refusal | headers: [{"allow", allowed}]}
  end

  @spec no_object() :: t()
  def no_object,
    do: new(400, "invalid_json", "The body must be a JSON object whose `model` is a string.")

  @spec no_body() :: t()
  def no_body,
    do: new(408, "body_incomplete", "The request did not come in time. Send it again.")

  @spec malformed(String.t()) :: t()
  def malformed(what),
    do: new(400, "malformed_request", "The request is none of HTTP/1.1. " <> what)

  @spec head_too_large(pos_integer()) :: t()
  def head_too_large(limit) do
    new(
      431,
      "head_too_large",
      "The first line and the headers may have #{limit} bytes, and these have more."
    )
  end

  @spec too_many_clients() :: t()
  def too_many_clients do
    later(
      new(503, "overloaded", "As many clients are connected as may be. Try again later."),
      nil
    )
  end

  @spec unnamed() :: t()
  def unnamed,
    do:
      new(400, "model_not_given", "The body must name a `model`; `/v1/models` has what there is.")

  @spec no_model(String.t()) :: t()
  def no_model(name) do
    name = if String.valid?(name), do: String.slice(name, 0, 200), else: "?"
    new(404, "model_not_found", "There is no model `#{name}`; `/v1/models` has what there is.")
  end

  @spec wrong_runner(String.t(), String.t()) :: t()
  def wrong_runner(name, "generate"),
    do: new(400, "unsupported", "The model `#{name}` makes vectors and generates no text.")

  def wrong_runner(name, "pooling"),
    do: new(400, "unsupported", "The model `#{name}` generates text and makes no vectors.")

  @spec not_done(String.t(), String.t()) :: t()
  def not_done(name, path),
    do: new(404, "unsupported", "The model `#{name}` does not do `#{path}`.")

  @spec wrong_host() :: t()
  def wrong_host do
    new(
      403,
      "host_not_allowed",
      "The server may not be called by the name in `Host`. Use one that it has, or let its operator list " <>
        "this one in its option `hosts:`."
    )
  end

  @spec too_large(pos_integer()) :: t()
  def too_large(limit),
    do: new(413, "body_too_large", "The body may have #{limit} bytes, and this one has more.")

  @spec too_many(pos_integer()) :: t()
  def too_many(count) do
    later(new(429, "overloaded", "#{count} requests are under way, and no more may be."), nil)
  end

  defp new(status, code, message), do: %__MODULE__{status: status, code: code, message: message}

  @doc "The refusal as an answer."
  @spec answer(t()) :: VLLM.OpenAI.answer()
  def answer(refusal) do
    headers = [{"content-type", "application/json"} | refusal.headers]
    {refusal.status, headers, JSON.encode(%{error: error(refusal)})}
  end

  @doc "The refusal as the last events of a stream that has begun at `path`."
  @spec event(t(), String.t()) :: String.t()
  def event(refusal, "/v1/messages"),
    do: "event: error\ndata: #{JSON.line(%{type: "error", error: error(refusal)})}\n\n"

  def event(refusal, "/v1/responses"),
    do: "event: error\ndata: #{JSON.line(refusal |> error() |> Map.put(:type, "error"))}\n\n"

  def event(refusal, _path),
    do: "data: #{JSON.line(%{error: error(refusal)})}\n\ndata: [DONE]\n\n"

  defp error(refusal) do
    %{message: refusal.message, type: type(refusal.status), param: nil, code: refusal.code}
  end

  defp type(401), do: "authentication_error"
  defp type(404), do: "not_found_error"
  defp type(429), do: "rate_limit_error"
  defp type(status) when status < 500, do: "invalid_request_error"
  defp type(_status), do: "server_error"
end
