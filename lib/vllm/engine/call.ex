defmodule VLLM.Engine.Call do
  @moduledoc false
  # How a call of a user's is to be served: until when, where, and what happens
  # when its worker dies. Times are absolute once the call has begun, so that
  # waiting, queueing, a second run and generating all draw on the same.

  alias VLLM.Bridge.Deadline
  alias VLLM.Error

  @enforce_keys [:timeout, :deadline]
  defstruct [
    :timeout,
    :deadline,
    :session,
    retry: false,
    queue_timeout: :infinity,
    queue_deadline: :infinity,
    inter_token_timeout: :infinity
  ]

  @type t :: %__MODULE__{
          timeout: timeout(),
          deadline: Deadline.t(),
          session: term(),
          retry: boolean(),
          queue_timeout: timeout(),
          queue_deadline: Deadline.t(),
          inter_token_timeout: timeout()
        }

  @doc "A call that begins now, with the options that it has of `VLLM.Options.call/0` and its kin."
  @spec new(%{required(:timeout) => timeout(), optional(atom()) => term()}) :: t()
  def new(options) do
    known = Map.take(options, [:timeout, :session, :retry, :queue_timeout, :inter_token_timeout])
    __MODULE__ |> struct!(Map.put(known, :deadline, :infinity)) |> begin()
  end

  @doc "The same call, begun now: for one of many prompts that has a deadline of its own."
  @spec begin(t()) :: t()
  def begin(call), do: queue(%{call | deadline: Deadline.new(call.timeout)})

  @doc "The same call, whose wait to be scheduled begins now."
  @spec queue(t()) :: t()
  def queue(call), do: %{call | queue_deadline: Deadline.new(call.queue_timeout)}

  @doc "The same call on its way to another node, where the clock shows something else: with times left."
  @spec depart(t()) :: t()
  def depart(call), do: deadlines(call, &Deadline.remaining/1)

  @doc "The same call where it has come to."
  @spec arrive(t()) :: t()
  def arrive(call), do: deadlines(call, &Deadline.new/1)

  defp deadlines(call, convert) do
    deadline = convert.(call.deadline)
    %{call | deadline: deadline, queue_deadline: convert.(call.queue_deadline)}
  end

  @doc "The error of a request that waited for a starting engine for too long."
  @spec queue_timeout(t()) :: Error.t()
  def queue_timeout(call) do
    Error.new(
      :queue_timeout,
      "No worker was ready within the request's `queue_timeout` of #{call.queue_timeout} ms. Wait " <>
        "for the engine with `VLLM.await_ready/2`, or give the request more.",
      %{"option" => "queue_timeout"}
    )
  end

  @doc "The error of a stream that has stalled."
  @spec stalled(t()) :: Error.t()
  def stalled(call) do
    Error.new(
      :timeout,
      "Nothing more came of the stream for #{call.inter_token_timeout} ms. If the engine is " <>
        "only slow, give the call more `inter_token_timeout:`.",
      %{"option" => "inter_token_timeout"}
    )
  end
end
