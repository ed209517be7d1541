/** What the visitor can mend: the message is a line for the page. */
export class Refused extends Error {}
