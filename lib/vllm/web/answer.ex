defmodule VLLM.Web.Answer do
  @moduledoc false
  # Answers of the admin API: JSON, and errors in one shape.

  alias VLLM.{Error, JSON}

  # What is kept back of an error's details: it is for bug reports, and in the log.
  @hidden ["traceback"]

  # Of all answers: nobody keeps them, and no browser takes them for something else.
  @headers [
    {"content-type", "application/json"},
    {"cache-control", "no-store"},
    {"x-content-type-options", "nosniff"}
  ]

  @statuses %{
    # What is asked for is not there, or not to be had in this state.
    job_not_found: 404,
    model_not_found: 404,
    not_allowed: 403,
    name_taken: 409,
    in_use: 409,
    job_running: 409,
    not_running: 409,
    # What was given, or the model that it names.
    invalid_option: 422,
    unsupported: 422,
    not_a_model: 422,
    model_gated: 422,
    unsupported_model: 422,
    unsupported_quantization: 422,
    invalid_checkpoint: 422,
    out_of_memory: 422,
    hub_unauthorized: 422,
    source_changed: 422,
    not_verified: 422,
    # Later, or once something is done about it.
    rate_limited: 429,
    overloaded: 429,
    timeout: 504,
    disk_full: 507,
    internal: 500,
    protocol: 500
  }

  @doc "The status of an error. What is not listed is the matter of this machine, its Python or its engines."
  @spec status(Error.t()) :: 400..599
  def status(%Error{reason: reason}), do: Map.get(@statuses, reason, 503)

  @doc "A term as JSON."
  @spec json(100..599, term()) :: VLLM.OpenAI.answer()
  def json(status, term), do: {status, @headers, JSON.encode(term)}

  @spec none() :: VLLM.OpenAI.answer()
  def none, do: {204, tl(@headers), ""}

  @doc "Events, as they come."
  @spec events(Enumerable.t()) :: VLLM.OpenAI.answer()
  def events(pieces),
    do:
      {200, List.keyreplace(@headers, "content-type", 0, {"content-type", "text/event-stream"}),
       pieces}

  @doc "An error of this library's."
  @spec error(Error.t()) :: VLLM.OpenAI.answer()
  def error(%Error{} = error),
    do: refusal(status(error), error.reason, error.message, [], error.details)

  @doc "A request that is refused by its form."
  @spec refusal(400..599, atom() | String.t(), String.t(), [{String.t(), String.t()}], map()) ::
          VLLM.OpenAI.answer()
  def refusal(status, reason, message, headers \\ [], details \\ %{}) do
    error = %{reason: reason, message: message, details: Map.drop(details, @hidden)}
    {status, @headers ++ headers, JSON.encode(%{error: error})}
  end

  @doc "An error as part of something else."
  @spec about(Error.t() | nil) :: map() | nil
  def about(nil), do: nil
  def about(%Error{reason: reason, message: message}), do: %{reason: reason, message: message}
end
