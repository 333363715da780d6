defmodule VLLM.Remote.Gauge do
  @moduledoc false
  # Whether the receiver of a stream keeps up that is on another node, where its mailbox cannot be
  # seen from here: a VLLM.Remote.Proxy there looks at it. So many messages may be on the way to it as
  # make a receiver busy; for each half of these the proxy says when there is room. Of a receiver whose
  # node has no such proxy nothing is known: it counts as one that keeps up.

  alias VLLM.Bridge.Inbox
  alias VLLM.Engine.Call
  alias VLLM.Error
  alias VLLM.Remote
  alias VLLM.Streaming.Mailbox

  @enforce_keys [:remote, :inbox]
  defstruct [:remote, :inbox, unseen: 0]

  @type t :: %__MODULE__{
          remote: Remote.Call.t() | nil,
          inbox: Inbox.t(),
          unseen: non_neg_integer()
        }

  @half div(Mailbox.busy(), 2)

  @doc "A gauge for the receiver `pid`, whose messages come to an inbox of its own."
  @spec open(pid()) :: t()
  def open(pid) do
    inbox = Inbox.new()
    call = Call.new(%{timeout: :infinity})
    remote = Remote.Call.open(node(pid), pid, :gauge, call, inbox)
    %__MODULE__{remote: remote, inbox: inbox}
  end

  @doc "Notes that a message was sent to the receiver."
  @spec sent(t()) :: t()
  def sent(%{remote: nil} = gauge), do: gauge

  def sent(%{unseen: unseen} = gauge) do
    if rem(unseen + 1, @half) == 0, do: Remote.Call.tell(gauge.remote, :look)
    %{gauge | unseen: unseen + 1}
  end

  @doc "Whether the receiver is to get no more for now."
  @spec full?(t()) :: boolean()
  def full?(%{unseen: unseen}), do: unseen >= 2 * @half

  @doc "What has come to the gauge's inbox says: there is room, or nothing more will be known."
  @spec handle(t(), Inbox.message()) :: {:ok, t()} | {:error, Error.t()}
  def handle(gauge, {_ref, :room}), do: {:ok, %{gauge | unseen: gauge.unseen - @half}}

  def handle(gauge, last) do
    case Remote.Call.last(gauge.remote, last) do
      {:error, %Error{reason: :node_incompatible}} -> {:ok, %{gauge | remote: nil, unseen: 0}}
      {:error, error} -> {:error, error}
    end
  end
end
